/* One method at work: the picture, the map of its tokens, its counters, what to do with it. */

export const ABOUT = {
  target: ["exact", "The large model alone, one step after the other."],
  cspd: ["approximate", "A small model drafts tokens, the large one judges many at once."],
  lossless: ["exact", "The large model drafts its own denoising steps: same distribution, fewer calls."],
  draft: ["the draft's distribution", "The small model alone."],
};

export function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

export const picture = (png) => `data:image/png;base64,${png}`;
const count = (number) => number.toLocaleString("en");

export class Card {
  constructor(model, body, title = body.method, output = ABOUT[body.method][0]) {
    const root = document.getElementById("card").content.cloneNode(true).firstElementChild;
    Object.assign(this, { root, model, body, title, judged: 0, accepted: 0, known: 0 });
    this.find = (selector) => root.querySelector(selector);
    root.dataset.method = title === body.method ? title : "baseline";
    this.find("h2").textContent = title;
    this.find(".output").textContent = output;
    this.find(".bar").setAttribute("aria-label", `${title}: progress`);
    if (body.n > 1) this.sheet();
    else this.map();
  }

  map() {
    const map = this.find(".map");
    map.style.gridTemplateColumns = `repeat(${this.model.grid}, 1fr)`;
    map.classList.toggle("fine", this.model.grid > 10);
    this.cells = Array.from({ length: this.model.grid ** 2 }, () => element("i", { className: "cell" }));
    map.append(...this.cells);
  }

  sheet() {
    this.find(".views").replaceChildren(element("div", { className: "sheet" }));
    for (const name of [".bar", ".history"]) this.find(name).remove();
  }

  say(text) { this.find(".verdict").textContent = text; }

  image(png, alt) {
    const made = element("img", { src: picture(png), alt });
    made.classList.toggle("small", this.model.image_size < 128);
    return made;
  }

  step(data) {
    const accepted = new Set(data.accepted), rejected = new Set(data.rejected);
    for (const cell of this.cells) cell.classList.remove("new");
    for (const position of data.new) {
      const kind = accepted.has(position) ? "accepted" : rejected.has(position) ? "rejected" : "alone";
      this.cells[position].className = `cell new ${kind}`;
    }
    this.accepted += accepted.size;
    this.judged += accepted.size + rejected.size;
    this.known = data.known;
    const alone = data.new.length - accepted.size - rejected.size;
    this.column({ accepted: accepted.size, rejected: rejected.size, alone });
    const alt = `${this.title}: unfinished, ${data.known} of ${data.total} tokens`;
    this.find(".canvas").replaceChildren(this.image(data.preview, alt));
    this.progress(data);
    this.numbers(data);
  }

  column(counts) {
    const column = element("span");
    for (const [kind, tokens] of Object.entries(counts)) {
      if (!tokens) continue;
      const part = element("i", { className: kind });
      part.style.height = `${Math.max(3, tokens * 3)}px`;
      column.append(part);
    }
    this.find(".history").append(column);
  }

  progress(data) {
    const share = Math.round(100 * data.known / data.total);
    this.find(".known").textContent = `${data.known}/${data.total}`;
    this.find(".bar").setAttribute("aria-valuenow", share);
    this.find(".bar i").style.width = `${share}%`;
    this.find(".map").setAttribute("aria-label",
      `${data.known} of ${data.total} tokens, ${this.accepted} accepted, ${this.judged - this.accepted} rejected`);
  }

  numbers(data) {
    if (this.judged) this.find(".rate").textContent = `${Math.round(100 * this.accepted / this.judged)} %`;
    this.find(".target").textContent = count(data.target_calls);
    this.find(".draft").textContent = count(data.draft_calls);
    this.find(".head").textContent = count(data.head_calls);
    this.find(".time").textContent = `${data.seconds.toFixed(2)} s`;
  }

  /* The finished images of one batch; `answers` are the server's. */
  done(answers) {
    const [first] = answers, alt = `${first.class_name}, made with ${this.title}`;
    Object.assign(this, { answers, seconds: first.seconds, targetCalls: first.target_calls });
    this.saved = 1 - first.head_calls / first.plain_head_calls;
    this.calls = `${count(first.head_calls)} of ${count(first.plain_head_calls)} calls of the head`;
    if (answers.length > 1) {
      this.accepted = answers.reduce((sum, answer) => sum + answer.accepted, 0);
      this.judged = answers.reduce((sum, answer) => sum + answer.proposed, 0);
      this.find(".known").textContent = count(answers.length * this.model.grid ** 2);
      this.find(".sheet").replaceChildren(
        ...answers.map((answer) => this.image(answer.png, `${alt}, image ${answer.index}`)));
    } else {
      this.find(".canvas").replaceChildren(this.image(first.png, alt));
    }
    this.numbers(first);
    this.say(`${first.class_name}, seed ${this.body.seed}, finished`);
    if (this.saved > 0) this.spared();
    this.find(".tools").hidden = false;
  }

  /* What speculation inside the head spared. */
  spared() {
    this.find(".spared").hidden = false;
    this.find(".spared").replaceChildren(
      element("b", { textContent: `${Math.round(100 * this.saved)} %` }), ` saved: ${this.calls}`);
  }

  compare(base) {
    const ratio = element("b", { textContent: `${(base / this.seconds).toFixed(2)}×` });
    this.find(".verdict").replaceChildren(ratio, " the speed of the target");
  }

  save() {
    for (const answer of this.answers) {
      const name = `${answer.class_name}-${this.body.method}-${this.body.seed}-${answer.index}.png`;
      element("a", { href: picture(answer.png), download: name.replace(/[^\w.-]+/g, "-") }).click();
    }
  }

  showCommand(text) {
    const code = this.find(".command");
    code.textContent = text;
    code.hidden = false;
    getSelection().selectAllChildren(code);
  }
}
