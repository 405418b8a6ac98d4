// The pictures tell what each of their pixels contributes, and a click keeps a place.
const read = (viewer) => {
  if (!viewer.values) {
    const bytes = Uint8Array.from(atob(viewer.dataset.numbers), (character) => character.charCodeAt(0));
    viewer.values = new DataView(bytes.buffer);
  }
  return viewer.values;
};
const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
const placed = (event) => {
  const image = event.target.closest && event.target.closest(".bc-picture img");
  const viewer = image && image.closest(".bc-viewer");
  if (!viewer) return null;
  const box = image.getBoundingClientRect();
  const [width, height] = [Number(viewer.dataset.width), Number(viewer.dataset.height)];
  const inside = (position, size, count) => Math.min(count - 1, Math.max(0, Math.floor((position / size) * count)));
  const column = inside(event.clientX - box.left, box.width, width);
  const row = inside(event.clientY - box.top, box.height, height);
  return { viewer, width, height, row, column };
};
const mark = ({ viewer, width, height, row, column }) => {
  viewer.style.setProperty("--bc-left", `${((column + 0.5) / width) * 100}%`);
  viewer.style.setProperty("--bc-top", `${((row + 0.5) / height) * 100}%`);
  viewer.classList.add("bc-marked");
};
// Drawn anew with other controls, it is the same explanation: the place stays marked.
let kept = null;
watch("value", () => {
  const viewer = element.querySelector(".bc-viewer");
  if (kept && viewer && viewer.dataset.numbers === kept.numbers) mark({ ...kept, viewer });
  else kept = null;
});
element.addEventListener("pointermove", (event) => {
  const place = placed(event);
  if (!place) return;
  const value = read(place.viewer).getFloat32(4 * (place.row * place.width + place.column), true);
  const share = (100 * value) / Number(place.viewer.dataset.value);
  place.viewer.querySelector(".bc-hover").textContent =
    `Row ${place.row}, column ${place.column}: ${signed(value, 4)}, ${signed(share, 2)} % of the whole`;
});
element.addEventListener("click", (event) => {
  const place = placed(event);
  if (!place) return;
  mark(place);
  kept = { ...place, numbers: place.viewer.dataset.numbers };
  trigger("click", { row: place.row, column: place.column });
});
