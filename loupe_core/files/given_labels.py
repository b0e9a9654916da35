"""Labels that a data set has at hand, also torchvision's own sets, which keep them to themselves."""

from typing import Any

from torch.utils.data import Dataset


def given_labels(dataset: Dataset) -> Any:
    """`labels` or `targets` of a data set, or what torchvision's own classes have in their place; else None.

    StanfordCars, FGVCAircraft, OxfordIIITPet, Flowers102, INaturalist and others of torchvision have neither, although
    they have read all labels. A set with several targets, or with none that is a class, has no labels.
    """
    for name in ("labels", "targets"):
        if hasattr(dataset, name):
            return getattr(dataset, name)
    found = getattr(dataset, "_labels", None)
    if hasattr(dataset, "_samples"):  # Stanford Cars: path, label
        found = [label for _, label in dataset._samples]
    elif hasattr(dataset, "_bin_labels"):  # pets
        of_kind = {"category": dataset._labels, "binary-category": dataset._bin_labels}
        found = of_kind.get(dataset._target_types[0]) if len(dataset._target_types) == 1 else None
    elif hasattr(dataset, "categories_map"):  # iNaturalist
        kind = dataset.target_type[0]
        found = [label if kind == "full" else dataset.categories_map[label][kind] for label, _ in dataset.index]
        found = found if len(dataset.target_type) == 1 else None
    change = getattr(dataset, "target_transform", None)
    return found if found is None or change is None else [change(label) for label in found]
