// The trained Loupe in ONNX Runtime's WebAssembly: one thread, since a published page may have no more.
import {modelInput} from "./lab_input.js";

// Fetches one of the page's files. An Error says in one line which is missing.
export async function get(url) {
  const answer = await fetch(url).catch(error => ({statusText: error.message}));
  if (!answer.ok)
    throw new Error(`${url.pathname}: not loaded (${answer.status ?? ""} ${answer.statusText}); build the book again ` +
      "with make book, and serve its folder");
  return answer;
}

export function softmax(logits) {
  const highest = Math.max(...logits), powers = logits.map(z => Math.exp(z - highest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map(p => p / sum);
}

// `base`: URL of _static. `settings`: lab.json's model. Returns predict: ImageData -> {logits, probabilities (K,),
// mask {values, side}, input: bytes of the model's picture, milliseconds: of input and network together}.
export async function loadNetwork(base, settings) {
  if (typeof WebAssembly !== "object")
    throw new Error("This browser has no WebAssembly, or it is switched off, and the network needs it: try another");
  const where = new URL((await (await get(new URL("npm/where.json", base))).json()).onnxruntime, base);
  const model = await (await get(new URL(`lab/${settings.file}`, base))).arrayBuffer();
  let ort, session;
  try {
    ort = await import(new URL("ort.wasm.min.mjs", where));
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmPaths = where.href;
    ort.env.logLevel = "error";
    session = await ort.InferenceSession.create(new Uint8Array(model), {executionProviders: ["wasm"]});
  } catch (error) {
    throw new Error(`ONNX Runtime cannot be started from ${where.href} (${error.message}); check the connection and ` +
      "load the page again");
  }
  return async picture => {
    const began = performance.now(), {bytes, values} = modelInput(picture, settings);
    const image = new ort.Tensor("float32", values, [1, 3, settings.crop, settings.crop]);
    const {logits, mask} = await session.run({image});
    return {logits: Array.from(logits.data), probabilities: softmax(Array.from(logits.data)), input: bytes,
      mask: {values: Array.from(mask.data), side: mask.dims[3]}, milliseconds: performance.now() - began};
  };
}
