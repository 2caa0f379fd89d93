/* What the page asks the server, and the command that does the same. */

export class Failure extends Error {
  constructor(problem, status) {
    super(problem.message);
    this.problem = problem;
    this.status = status;
  }
}

async function ask(path, key, options = {}) {
  const headers = { "Content-Type": "application/json", Accept: options.accept ?? "*/*" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const unknown = { message: `The server answered ${response.status}.` };
  throw new Failure(body.error ?? unknown, response.status);
}

export async function models(key) {
  return (await (await ask("/v1/models", key)).json()).data;
}

export async function images(body, key, signal) {
  const options = { method: "POST", body: JSON.stringify(body), signal, accept: "application/json" };
  return (await (await ask("/v1/images", key, options)).json()).images;
}

/* Server-sent events of one image in the making: [kind, data], the last of them "done". */
export async function* events(body, key, signal) {
  const options = { method: "POST", body: JSON.stringify(body), signal };
  const response = await ask("/v1/images/stream", key, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", kind = "";
  while (kind !== "done") {
    const { done, value } = await reader.read();
    if (done) throw new Failure({ message: "The server ended the answer too early." });
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const [, name, json] = /^event: (.*)\ndata: (.*)$/s.exec(block);
      const data = JSON.parse(json);
      kind = name;
      if (kind === "error") throw new Failure(data);
      yield [kind, data];
    }
  }
}

/* The command that writes the same files, to the byte. */
export function command(body, model) {
  const words = ["cspd-run", "generate"];
  if (!model.shipped) words.push("BUNDLE");
  words.push("--labels", model.classes.indexOf(body.label), "--num-images", body.n ?? 1);
  const { label, n, ...options } = body;
  if (body.method === "lossless") options.window ??= 8;
  options.batch_size = model.batch_size;
  for (const [name, value] of Object.entries(options)) words.push(`--${name.replaceAll("_", "-")}`, value);
  return words.join(" ");
}
