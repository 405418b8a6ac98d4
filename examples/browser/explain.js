// Runs an exported network with onnxruntime-web: one forward pass gives logits and contributions.
import * as ort from "./vendor/ort.wasm.min.mjs";

ort.env.wasm.wasmPaths = new URL("./vendor/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more need headers that a plain file server does not send

const element = (id) => document.getElementById(id);
const [status, target, picture, map] = ["status", "target", "picture", "map"].map(element);
let network = null;
let bitmap = null;

function show(text, state = "ready") {
  status.textContent = text;
  status.dataset.state = state;
}

// The metadata of a file: field 14 of the protocol buffer, pairs of a key (1) and a value (2).
function metadata(bytes) {
  const facts = {};
  for (const [field, pair] of fields(bytes)) {
    if (field !== 14) continue;
    const entry = new Map(fields(pair));
    const [key, value] = [1, 2].map((part) => new TextDecoder().decode(entry.get(part)));
    facts[key] = value;
  }
  return facts;
}

function* fields(bytes) {
  let place = 0;
  const varint = () => {
    for (let value = 0, factor = 1; ; factor *= 128) {
      const byte = bytes[place++];
      value += (byte & 127) * factor;
      if (!(byte & 128)) return value;
    }
  };
  while (place < bytes.length) {
    const tag = varint();
    if (tag % 8 === 0) varint();
    else if (tag % 8 === 2) {
      const length = varint();
      yield [Math.floor(tag / 8), bytes.subarray(place, place + length)];
      place += length;
    } else throw new Error("this is no ONNX file");
  }
}

async function open(bytes) {
  show("Opening the network …", "busy");
  const facts = metadata(bytes);
  if (!facts.transform) throw new Error("this file was not written by bcoskit export");
  const session = await ort.InferenceSession.create(bytes);
  network = { session, loss: facts.loss, classes: JSON.parse(facts.classes), transform: JSON.parse(facts.transform) };
  target.replaceChildren(target.options[0], ...network.classes.map((name, index) => new Option(name, index)));
  target.value = "-1";
  element("image").disabled = target.disabled = false;
  show(`${facts.name} is ready: choose an image.`);
}

// Half of what is cut off; halves of pixels are rounded to even numbers, as in Python.
function margin(excess) {
  const half = Math.floor(excess / 2);
  return half + (excess % 2) * (half % 2);
}

// Resize and centre crop, as the transform says; browsers resize without its antialiasing, so that logits differ a little.
function pixels() {
  const { size, resize, channels } = network.transform;
  const shorter = resize ?? size;
  const longer = Math.trunc((shorter * Math.max(bitmap.width, bitmap.height)) / Math.min(bitmap.width, bitmap.height));
  const [width, height] = bitmap.width <= bitmap.height ? [shorter, longer] : [longer, shorter];
  picture.width = picture.height = size;
  const context = picture.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, size, size);
  context.drawImage(bitmap, -margin(width - size), -margin(height - size), width, height);
  const rgba = context.getImageData(0, 0, size, size).data;
  const values = new Float32Array(channels * size * size);
  for (let place = 0; place < size * size; place++) {
    const [red, green, blue] = rgba.subarray(4 * place, 4 * place + 3);
    const grey = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16; // as Pillow computes it
    const seen = channels === 1 ? [grey] : [red, green, blue];
    seen.forEach((value, channel) => (values[channel * size * size + place] = value / 255));
  }
  return new ort.Tensor("float32", values, [1, channels, size, size]);
}

// A sigmoid or a softmax makes probabilities; without them there are outputs only.
function strength(logits, index) {
  const totals = {
    bce: () => 1 + Math.exp(-logits[index]),
    cross_entropy: () => logits.reduce((sum, logit) => sum + Math.exp(logit - logits[index]), 0),
  };
  if (!Object.hasOwn(totals, network.loss)) return `output ${logits[index].toPrecision(4)}`;
  return `${(100 / totals[network.loss]()).toFixed(1)} %`;
}

function draw(contributions, size) {
  const strongest = contributions.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-12);
  map.width = map.height = size;
  const image = new ImageData(size, size);
  contributions.forEach((value, place) => {
    const [red, blue] = [Math.min(1, 1 + value / strongest), Math.min(1, 1 - value / strongest)];
    image.data.set([255 * red, 255 * Math.min(red, blue), 255 * blue, 255], 4 * place);
  });
  map.getContext("2d").putImageData(image, 0, 0);
}

async function explain() {
  if (!network || !bitmap) return;
  show("Explaining …", "busy");
  const started = performance.now();
  const chosen = new ort.Tensor("int64", BigInt64Array.of(BigInt(target.value)), [1]);
  const outputs = await network.session.run({ image: pixels(), target: chosen }, ["logits", "contributions"]);
  const logits = outputs.logits.data;
  const index = target.value === "-1" ? logits.indexOf(Math.max(...logits)) : Number(target.value);
  draw(outputs.contributions.data, network.transform.size);
  status.dataset.logit = logits[index];
  show(`${network.classes[index]}: ${strength(logits, index)}, in ${Math.round(performance.now() - started)} ms`, "explained");
}

// One thing after the other, since a network answers one question at a time.
let last = Promise.resolve();
function after(work) {
  last = last.then(work).catch((error) => show(`This did not work: ${error.message}`, "error"));
}

element("model").addEventListener("change", ({ target: { files } }) => {
  if (files.length) after(async () => open(new Uint8Array(await files[0].arrayBuffer())).then(explain));
});
element("image").addEventListener("change", ({ target: { files } }) => {
  if (!files.length) return;
  after(async () => {
    bitmap = await createImageBitmap(files[0]);
    await explain();
  });
});
target.addEventListener("change", () => after(explain));
after(async () => {
  const answer = await fetch("model.onnx");
  if (answer.ok) await open(new Uint8Array(await answer.arrayBuffer()));
  else show("Choose a network.");
});
