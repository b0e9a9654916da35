"""A CUDA card that is none: with it, tests find code that mixes devices on machines without a card.

    with card():
        model.to("cuda"); model(images)      # RuntimeError: two devices, cuda:0 and cpu

A tensor is on the card where its storage is marked so; its bytes stay in the CPU's memory, so PyTorch's own kernels,
autograd, views, Parameters and state dicts work as they are. What is emulated:

- Every operation is looked at (a `TorchDispatchMode`, in the backward pass too): tensors of two devices raise as CUDA's
  do. As there, a CPU tensor without axes may join elementwise ones, CPU indices may index a tensor on the card, and
  `copy_` and `.to` go across. Results are on the card of their inputs.
- `.device`, `.is_cuda`, `.to`, `.cuda`, `.cpu` and the factory functions (`torch.zeros(..., device="cuda")`) know it;
  `.numpy()` and `np.asarray` raise a TypeError.
- The card has random numbers of its own: nothing that is drawn there moves the CPU's generator, and a CPU generator is
  refused there.
- `torch.save` notes "cuda:0", so a reader without a card needs `map_location`.
- `torch.cuda` says that there is one card, and Accelerate therefore chooses it. Autocast works in the CPU's kernels.

Not emulated: kernels that exist on one device only, their rounding, speed and memory, streams, several cards, tracing
(torch.compile, torch.export) of a model that is on the card, `with torch.device("cuda"):`.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
ACROSS = {"copy_", "_foreach_copy_"}  # operations that may have tensors of both
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
WITH_NUMBER = {"masked_fill", "masked_fill_", "fill", "fill_", "where"}  # elementwise in this respect
FACTORIES = """arange as_tensor asarray empty empty_strided eye full linspace logspace ones rand randint randn randperm
scalar_tensor tensor tril_indices triu_indices zeros hann_window hamming_window empty_like full_like ones_like rand_like
randint_like randn_like zeros_like""".split()
METHODS = "new_empty new_full new_ones new_zeros".split()

# What lies on the card, of one that ended too: a cache may keep it for the next. The weak reference keeps the address
# from being reused.
_held: dict[int, StorageWeakRef] = {}
_generators: dict[int, torch._C.Generator] = {}  # those of the card
_state = {"rng": torch.Generator().manual_seed(0).get_state()}  # of the card's random numbers


def is_on_card(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies on the emulated card."""
    try:
        return tensor.untyped_storage()._cdata in _held
    except (NotImplementedError, RuntimeError):  # sparse and others without a storage
        return False


def _place(tensor: torch.Tensor, on_card: bool) -> torch.Tensor:
    """Marks a tensor's storage."""
    storage = tensor.untyped_storage()
    if not on_card:
        _held.pop(storage._cdata, None)
    elif storage._cdata not in _held:
        if len(_held) % 1000 == 999:
            for key in [key for key, ref in _held.items() if ref.expired()]:
                del _held[key]
        _held[storage._cdata] = StorageWeakRef(storage)
    return tensor


class _Move(torch.autograd.Function):
    """A copy on the other side; its gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, on_card: bool) -> torch.Tensor:
        ctx.on_card = on_card
        return _place(tensor.clone(), on_card)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        return _Move.apply(gradient, not ctx.on_card), None


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class _Watch(TorchDispatchMode):
    """Looks at every operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((*args, *kwargs.values())))
        here = [tensor for tensor in inputs if is_on_card(tensor)]
        generator = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch._C.Generator)), None)
        if inputs and generator is not None:
            _check_generator(generator, bool(here))
        if not here:
            return func(*args, **kwargs)
        if len(here) < len(inputs):
            _check_mixture(func, args, [tensor for tensor in inputs if not is_on_card(tensor)])
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        drawn = generator is None and torch.Tag.nondeterministic_seeded in func.tags
        with _cards_numbers() if drawn else contextlib.nullcontext():
            out = func(*args, **kwargs)
        for tensor in _tensors(out if isinstance(out, (list, tuple)) else [out]):
            if tensor.untyped_storage()._cdata not in known:
                _place(tensor, True)
        return out


def _check_mixture(func: Any, args: tuple, others: list[torch.Tensor]) -> None:
    """Raises where tensors on the card meet `others`, and CUDA would."""
    name = func.overloadpacket.__name__
    if name in ACROSS:
        return
    if name in INDEXING:
        if not is_on_card(args[0]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        others = [value for value in others if not any(value is index for index in args[1])]
    number = torch.Tag.pointwise in func.tags or name in INDEXING | WITH_NUMBER or name.startswith("_foreach_")
    changed = func._schema.is_mutable and any(args[0] is other for other in others)
    if changed or any(other.ndim or not number for other in others):
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                           f"cpu! (when checking the arguments of {name})")


def _check_generator(generator: torch._C.Generator, on_card: bool) -> None:
    found, wanted = ("cuda" if where else "cpu" for where in (generator._cdata in _generators, on_card))
    if found != wanted:
        raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}'")


@contextlib.contextmanager
def _cards_numbers() -> Iterator[None]:
    """Within it the default generator is the card's."""
    before = torch.get_rng_state()
    torch.set_rng_state(_state["rng"])
    try:
        yield
    finally:
        _state["rng"] = torch.get_rng_state()
        torch.set_rng_state(before)


class _Generator(torch._C.Generator):
    """`torch.Generator`, of either device."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls, device="cpu")
        if torch.device(device).type == "cuda":
            _generators[made._cdata] = made  # kept, as PyTorch hands on another object of the same generator
        return made

    device = property(lambda self: CUDA if self._cdata in _generators else torch.device("cpu"))


def _factory(function: Callable) -> Callable:
    """A factory function, or a method that makes a new tensor, which knows the card."""
    def made(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is None:
            return function(*args, **kwargs)
        device = torch.device(device) if not isinstance(device, int) else CUDA
        if device.type not in ("cpu", "cuda"):
            return function(*args, device=device, **kwargs)
        on_card = device.type == "cuda"
        if (generator := kwargs.get("generator")) is not None:
            _check_generator(generator, on_card)
        with _cards_numbers() if on_card and generator is None else contextlib.nullcontext():
            out = function(*args, device="cpu", **kwargs)
        if function.__name__ in ("as_tensor", "asarray"):  # they may have made nothing
            return out if is_on_card(out) == on_card else _Move.apply(out, on_card)
        return _place(out, on_card)

    made.__name__ = function.__name__
    return made


def _to(original: Callable) -> Callable:
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args, device = list(args), kwargs.pop("device", None)
        other = kwargs.pop("other", None)
        if args and isinstance(args[0], torch.Tensor):
            other = args.pop(0)
        elif args and isinstance(args[0], (str, int, torch.device)):
            device, args[0] = args[0], None
        if other is not None:
            device, args = other.device, [None, other.dtype, *args]
        device = CUDA if isinstance(device, int) else device and torch.device(device)
        if device is None or device.type not in ("cpu", "cuda"):
            return original(self, *([device, *args[1:]] if args and args[0] is None else args),
                            **({"device": device} if device is not None and not args else {}), **kwargs)
        args = ["cpu" if args[0] is None else args[0], *args[1:]] if args else []
        out, on_card = original(self, *args, **kwargs) if args or kwargs else self, device.type == "cuda"
        return out if self.is_meta or is_on_card(out) == on_card else _Move.apply(out, on_card)

    return to


def _no_numpy(original: Callable) -> Callable:
    def refuse(self: torch.Tensor, *args: Any, force: bool = False, **kwargs: Any) -> Any:
        if is_on_card(self):
            if force:
                return original(self.detach().to("cpu"), *args, **kwargs)
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to "
                            "host memory first.")
        return original(self, *args, **(kwargs | ({"force": True} if force else {})))

    return refuse


def _like_self(original: Callable) -> Callable:
    """A method whose result lies where `self` does, although no operation of PyTorch tells."""
    def made(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.pop("device", self.device)
        return _place(original(self, *args, **kwargs), torch.device(device).type == "cuda")

    return made


def _cuda(bf16: bool) -> dict[str, Any]:
    """What `torch.cuda` says of the card."""
    def seed(number: int) -> None:
        _state["rng"] = torch.Generator().manual_seed(number).get_state()

    def state_of(device: Any = None) -> torch.Tensor:
        return _state["rng"].clone()

    def restore(state: torch.Tensor, device: Any = None) -> None:
        _state["rng"] = state.cpu().clone()

    facts = SimpleNamespace(name="Emulated Card", major=8 if bf16 else 7, minor=0, total_memory=16 * 2**30,
                            multi_processor_count=40)
    return dict(
        is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, is_initialized=lambda: True,
        get_device_name=lambda device=None: facts.name, get_device_properties=lambda device=None: facts,
        get_device_capability=lambda device=None: (facts.major, facts.minor),
        is_bf16_supported=lambda including_emulation=True: bf16 or including_emulation,
        set_device=lambda device: None, synchronize=lambda device=None: None, empty_cache=lambda: None,
        device=lambda device=None: contextlib.nullcontext(), manual_seed=seed, manual_seed_all=seed,
        get_rng_state=state_of, set_rng_state=restore, get_rng_state_all=lambda: [state_of()],
        set_rng_state_all=lambda states: restore(states[0]), memory_allocated=lambda device=None: 0,
        max_memory_allocated=lambda device=None: 0, reset_peak_memory_stats=lambda device=None: None,
        memory_reserved=lambda device=None: 0, mem_get_info=lambda device=None: (facts.total_memory,) * 2,
        _lazy_init=lambda: None,
    )


def _autocast(original: Callable) -> Callable:
    def begin(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, "cpu" if str(device_type).startswith("cuda") else device_type, *args, **kwargs)

    return begin


def _tagger(storage: Any) -> str | None:
    storage = getattr(storage, "_untyped_storage", storage)
    return "cuda:0" if storage._cdata in _held else None


def _restore(storage: Any, location: str) -> Any:
    if not location.startswith("cuda"):
        return None
    _held[storage._cdata] = StorageWeakRef(storage)
    return storage


def _forget_devices() -> None:
    """Accelerate keeps the device that it has chosen."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()


@contextlib.contextmanager
def card(bf16: bool = True) -> Iterator[torch.device]:
    """Within it there is one emulated card; yields its device.

    Args:
        bf16: whether it computes in bf16, as an A100 does and a T4 does not.
    """
    T, T0 = torch.Tensor, torch._C.TensorBase
    new = dict(
        device=property(lambda self: CUDA if is_on_card(self) else T0.device.__get__(self)),
        is_cuda=property(is_on_card), is_cpu=property(lambda self: not is_on_card(self) and T0.is_cpu.__get__(self)),
        get_device=lambda self: 0 if is_on_card(self) else T0.get_device(self), to=_to(T0.to),
        cuda=lambda self, *args, **kwargs: self.to("cuda"), cpu=lambda self, *args, **kwargs: self.to("cpu"),
        numpy=_no_numpy(T0.numpy), __array__=_no_numpy(T.__array__), pin_memory=lambda self, device=None: self,
        new_tensor=_like_self(T0.new_tensor), __deepcopy__=_like_self(T.__deepcopy__),
        **{name: _factory(getattr(T0, name)) for name in METHODS})
    registry = torch.serialization._package_registry
    _device_constructors()  # it lists the factories once, and must list the original ones
    with contextlib.ExitStack() as stack:
        for name, value in new.items():
            stack.enter_context(_attribute(T, name, value))
        for name in FACTORIES:
            stack.enter_context(mock.patch.object(torch, name, _factory(getattr(torch, name))))
        for name, value in _cuda(bf16).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name, value in dict(is_available=lambda: True, current_device_index=lambda: 0, device_count=lambda: 1,
                                current_stream=lambda device=None: SimpleNamespace(is_capturing=lambda: False),
                                current_accelerator=lambda check_available=False: torch.device("cuda"),
                                set_device_index=lambda device: None, synchronize=lambda device=None: None).items():
            stack.enter_context(mock.patch.object(torch.accelerator, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        autocast = torch.amp.autocast_mode.autocast
        stack.enter_context(mock.patch.object(autocast, "__init__", _autocast(autocast.__init__)))
        stack.enter_context(mock.patch.dict("os.environ"))
        kept = list(registry)
        torch.serialization.register_package(1, _tagger, _restore)
        stack.callback(lambda: registry.__setitem__(slice(None), kept))
        _forget_devices()
        stack.callback(_forget_devices)
        stack.callback(_generators.clear)
        _state["rng"] = torch.Generator().manual_seed(0).get_state()
        stack.enter_context(_Watch())
        yield CUDA


@contextlib.contextmanager
def _attribute(owner: type, name: str, value: Any) -> Iterator[None]:
    """An attribute of a class for a while; one that was inherited is inherited again."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)


@pytest.fixture(name="card")
def emulated_card() -> Iterator[torch.device]:
    """The emulated card, for one test."""
    with card() as device:
        yield device
