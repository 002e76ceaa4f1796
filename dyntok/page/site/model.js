// The tokenizer's three graphs in onnxruntime-web.

const here = (path) => new URL(path, import.meta.url).href;

export class Model {
  /** Loads the graphs: on a GPU where the folder has that runtime and the browser a GPU, otherwise in WASM. */
  static async load(facts) {
    const gpu = facts.webgpu && navigator.gpu ? await navigator.gpu.requestAdapter().catch(() => null) : null;
    const model = new Model();
    model.backend = gpu ? "WebGPU" : "WASM";
    model.milliseconds = {};
    model.ort = await import(here(gpu ? "runtime/ort.webgpu.min.mjs" : "runtime/ort.wasm.min.mjs"));
    model.ort.env.wasm.wasmPaths = here("runtime/");
    model.ort.env.wasm.numThreads = 1; // more need headers that static hosts don't send
    const options = { executionProviders: gpu ? ["webgpu", "wasm"] : ["wasm"] };
    model.sessions = {};
    for (const name of ["score", "codes", "picture"])
      model.sessions[name] = await model.ort.InferenceSession.create(here(`model/${name}.onnx`), options);
    return model;
  }

  /** Returns {features, scores}: features stay a tensor, which `codes` takes. */
  async score({ pixels, size }) {
    const { features, score } = await this.#run("score", { pixels: this.#floats(pixels, [1, 3, ...size]) });
    return { features, scores: score.data };
  }

  /** Returns the codes of the kept patches, an array in the order of `kept`. */
  async codes(features, kept, grid) {
    const { codes } = await this.#run("codes", { features, keep: this.#floats(mask(kept, grid), grid) });
    return kept.map((position) => codes.data[position]);
  }

  /** Returns RGB pixels, Uint8Array. known: whether the places are those of the photograph, or guessed. */
  async picture(codes, kept, grid, known) {
    const plane = new Int32Array(grid[0] * grid[1]);
    kept.forEach((position, i) => (plane[position] = codes[i]));
    const { picture } = await this.#run("picture", {
      codes: new this.ort.Tensor("int32", plane, grid),
      keep: this.#floats(mask(kept, grid), grid),
      known: this.#floats(Float32Array.of(known ? 1 : 0), [1]),
    });
    const area = picture.data.length / 3;
    const rgb = new Uint8Array(3 * area);
    for (let c = 0; c < 3; c++)
      for (let i = 0; i < area; i++) rgb[3 * i + c] = Math.round(picture.data[c * area + i] * 255);
    return rgb;
  }

  #floats(values, shape) {
    return new this.ort.Tensor("float32", values, shape);
  }

  async #run(name, inputs) {
    const start = performance.now();
    const outputs = await this.sessions[name].run(inputs);
    this.milliseconds[name] = performance.now() - start;
    return outputs;
  }
}

function mask(kept, grid) {
  const values = new Float32Array(grid[0] * grid[1]);
  for (const position of kept) values[position] = 1;
  return values;
}
