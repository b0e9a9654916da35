// The first page's lens: two plates of the same birds, the second of which is seen through a round lens.
for (const plate of document.querySelectorAll(".lens-plate")) {
  const all = plate.closest("figure").querySelector("input");
  const at = {x: 0.27, y: 0.24};  // of the plate's width and height; the lens begins on the first bird

  const look = () => {
    plate.style.setProperty("--x", `${100 * at.x}%`);
    plate.style.setProperty("--y", `${100 * at.y}%`);
    plate.classList.toggle("lens-all", all.checked);
  };
  const within = value => Math.min(1, Math.max(0, value));
  const follow = event => {
    const box = plate.getBoundingClientRect();
    at.x = within((event.clientX - box.left) / box.width);
    at.y = within((event.clientY - box.top) / box.height);
    look();
  };
  plate.addEventListener("pointermove", follow);
  plate.addEventListener("pointerdown", follow);
  plate.addEventListener("keydown", event => {
    const step = {ArrowLeft: [-0.03, 0], ArrowRight: [0.03, 0], ArrowUp: [0, -0.04], ArrowDown: [0, 0.04]}[event.key];
    if (!step) return;
    event.preventDefault();
    at.x = within(at.x + step[0]);
    at.y = within(at.y + step[1]);
    look();
  });
  all.addEventListener("change", look);
  all.closest("label").hidden = false;
  plate.tabIndex = 0;
  plate.classList.add("lens-live");
  look();
}
