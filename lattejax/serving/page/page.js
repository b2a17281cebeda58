// The page: drawing, asking, the model's card. No library, no build; everything comes from this server.

const $ = (id) => document.getElementById(id);
const SMALL = 128; // pictures below are shown with their pixels
let card = null;

// ---- The server

class ServerError extends Error {}

async function call(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) $("key").hidden = false;
  const answer = await response.json().catch(() => null);
  const wait = response.headers.get("Retry-After");
  throw new ServerError((answer?.error?.message ?? `The server answers ${response.status}.`) + (wait ? ` (${wait} s)` : ""));
}

// Yields the data of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The connection to the server was lost.");
    }
    if (part.done) return;
    text += part.value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (!data || data === "[DONE]") continue;
      const values = JSON.parse(data);
      if (values.error) throw new ServerError(values.error.message);
      yield values;
    }
  }
}

function say(place, text, isBad = false) {
  place.textContent = text;
  place.classList.toggle("bad", isBad);
}

function make(tag, settings = {}, ...children) {
  const element = Object.assign(document.createElement(tag), settings);
  element.append(...children);
  return element;
}

function picture(source, alt) {
  const image = make("img", { alt });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < SMALL));
  image.src = source;
  return image;
}

// ---- The experts' bar

const hue = (group) => 215 + (group / Math.max(1, card.groups.length - 1)) * 180; // from the blue of noise to orange

function showExperts(place) {
  place.replaceChildren(...card.groups.map((group, i) => {
    const [low, high] = group.interval;
    const fill = make("b");
    const label = make("span", { title: `expert ${i + 1}: layers ${group.layers.join("–")}, t ${low} to ${high}` });
    label.textContent = `layers ${group.layers.join("–")}`;
    const part = make("div", {}, make("i", {}, fill), label);
    part.style.flex = high - low;
    part.style.setProperty("--hue", hue(i));
    return part;
  }));
}

// Which of the steps each expert takes; as the server assigns them.
function stepsOf(steps, shift) {
  const counts = card.groups.map(() => 0);
  for (let i = 0; i < steps; i++) {
    const t = (shift * i) / (shift * i + steps - i);
    let group = card.groups.findIndex(({ interval }) => t < interval[1] - 1e-12);
    counts[group < 0 ? counts.length - 1 : group]++;
  }
  return counts;
}

function showProgress(counts, step, active) {
  let before = 0;
  [...$("experts").children].forEach((part, group) => {
    const done = counts[group] ? Math.min(1, Math.max(0, (step - before) / counts[group])) : step > before ? 1 : 0;
    part.querySelector("b").style.width = `${100 * done}%`;
    part.classList.toggle("at-work", group === active);
    before += counts[group];
  });
}

// ---- Draw

const FIELDS = ["prompt", "count", "steps", "guidance", "shift", "seed"];
let drawing = null; // what stops the one in progress

function restore() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem("drawing") ?? "{}");
  } catch {
    localStorage.removeItem("drawing"); // not ours
  }
  for (const field of FIELDS) if (typeof kept[field] === "string") $(field).value = kept[field];
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function commandLine(prompt, settings) {
  const path = (text) => (/^[\w./-]+$/.test(text) ? text : quoted(text));
  const flags = {
    workdir: path(card.workdir), ...(card.autoencoder ? { autoencoder: path(card.autoencoder) } : {}),
    prompt: quoted(prompt), num: settings.n, steps: settings.num_inference_steps, guidance: settings.guidance_scale,
    shift: settings.shift, seed: settings.seed,
  };
  return `python -m lattejax.sample ${Object.entries(flags).map(([name, value]) => `--${name}=${value}`).join(" ")}`;
}

async function draw() {
  const kept = Object.fromEntries(FIELDS.map((field) => [field, $(field).value]));
  localStorage.setItem("drawing", JSON.stringify(kept));
  const prompt = $("prompt").value.trim();
  const settings = {
    n: $("count").valueAsNumber, num_inference_steps: $("steps").valueAsNumber,
    guidance_scale: $("guidance").valueAsNumber, shift: $("shift").valueAsNumber,
    seed: $("seed").value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : $("seed").valueAsNumber,
  };
  const counts = stepsOf(settings.num_inference_steps, settings.shift);
  const tiles = Array.from({ length: settings.n }, () => make("button", { type: "button", disabled: true }));
  $("pictures").replaceChildren(...tiles);
  $("command").hidden = true;
  showProgress(counts, 0, -1);
  say($("drawing-status"), "Waiting for its turn");
  drawing = new AbortController();
  $("go").textContent = "Stop";
  try {
    const body = { prompt, ...settings, stream: true, partial_images: 3, progress: true };
    for await (const told of events(await call("/v1/images/generations", body, drawing.signal))) {
      if (told.type === "image_generation.progress") {
        showProgress(counts, told.step, told.group);
        const [low, high] = card.groups[told.group].interval;
        say($("drawing-status"), `Expert ${told.group + 1} of ${card.groups.length}, flow time ${low} to ${high}: ` +
          `step ${told.step} of ${told.steps}`);
      } else {
        const source = `data:image/${told.output_format};base64,${told.b64_json}`;
        tiles[told.index].replaceChildren(picture(source, `${prompt}, picture ${told.index + 1}`));
        if (told.type === "image_generation.completed") {
          tiles[told.index].disabled = false;
          tiles[told.index].onclick = () => enlarge(source, `${prompt.replace(/\W+/g, "-")}-${settings.seed}-${told.index}`);
        }
      }
    }
    showProgress(counts, settings.num_inference_steps, -1);
    say($("drawing-status"), `Seed ${settings.seed}`);
    $("command").querySelector("code").textContent = commandLine(prompt, settings);
    $("command").hidden = false;
  } catch (error) {
    showProgress(counts, 0, -1);
    $("pictures").replaceChildren(...tiles.filter((tile) => !tile.disabled));
    if (error.name === "AbortError") say($("drawing-status"), "Stopped");
    else if (error instanceof ServerError) say($("drawing-status"), error.message, true);
    else throw error;
  } finally {
    drawing = null;
    $("go").textContent = "Draw";
  }
}

function enlarge(source, name) {
  const dialog = $("large");
  dialog.querySelector("img").replaceWith(picture(source, "The picture in full size"));
  $("save").href = source;
  $("save").download = `${name}.png`;
  $("ask-about").onclick = () => {
    dialog.close();
    location.hash = "ask";
    attach(source);
    $("question").focus();
  };
  dialog.showModal();
}

// ---- Ask

let messages = [];
let attached = [];
let asking = null;

function attach(source) {
  attached.push(source);
  showAttached();
}

function showAttached() {
  $("attached").replaceChildren(...attached.map((source, i) => {
    const button = make("button", { type: "button", ariaLabel: "Remove the image" }, picture(source, "An image to ask about"));
    button.onclick = () => { attached.splice(i, 1); showAttached(); };
    return button;
  }));
}

function readFiles(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    const reader = new FileReader();
    reader.onload = () => attach(reader.result);
    reader.readAsDataURL(file);
  }
}

async function ask() {
  const own = messages; // "New chat" replaces them while the answer comes
  const text = $("question").value.trim();
  const parts = attached.map((url) => ({ type: "image_url", image_url: { url } }));
  const question = { role: "user", content: [...parts, { type: "text", text }] };
  const shown = make("li", { className: "user" }, ...attached.map((url) => picture(url, "The image asked about")), text);
  const answer = make("li", { className: "assistant working" });
  $("turns").append(shown, answer);
  const before = { text: $("question").value, attached };
  $("question").value = "";
  attached = [];
  showAttached();
  say($("asking-status"), "");
  asking = new AbortController();
  $("send").textContent = "Stop";
  answer.scrollIntoView({ block: "nearest" });
  try {
    const body = { messages: [...own, question], stream: true };
    for await (const told of events(await call("/v1/chat/completions", body, asking.signal))) {
      answer.textContent += told.choices[0]?.delta.content ?? "";
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      shown.remove(), answer.remove();
      $("question").value = before.text;
      attached = before.attached;
      showAttached();
      if (!(error instanceof ServerError)) throw error;
      say($("asking-status"), error.message, true);
      return;
    }
  } finally {
    asking = null;
    answer.classList.remove("working");
    $("send").textContent = "Ask";
    $("question").focus();
  }
  if (answer.textContent) own.push(question, { role: "assistant", content: answer.textContent });
  else if (own === messages) say($("asking-status"), "The model has nothing to say.");
}

// ---- The model

const NAMES = {
  held_out_loss: "Flow-matching loss on held-out images",
  answer_accuracy: "Held-out questions answered correctly",
  frechet_train_test: "Fréchet distance of training to test images",
};

function scoreName(name) {
  const guided = name.match(/^(.*)_guidance_([\d.]+)$/);
  const of = { generated_accuracy: "Drawings read as prompted", frechet: "Fréchet distance to test images" };
  if (guided && of[guided[1]]) return `${of[guided[1]]}, guidance ${guided[2]}`;
  return NAMES[name] ?? name.replaceAll("_", " ");
}

function scoreValue(name, value) {
  return name.includes("accuracy") ? `${(100 * value).toFixed(1)} %` : value.toPrecision(3);
}

function list(place, pairs) {
  place.replaceChildren(...pairs.flatMap(([name, value]) => [
    make("dt", { textContent: name }), make("dd", { textContent: value })]));
}

function showCard() {
  document.title = `${card.name} · lattejax`;
  $("name").textContent = card.name;
  $("count").max = card.limits.n;
  $("steps").max = card.limits.steps;
  for (const [name, value] of Object.entries(card.sampling)) $(name).value = value;
  $("ideas").replaceChildren(...card.prompts.slice(0, 5).map((text) => {
    const idea = make("button", { type: "button", className: "quiet", textContent: text });
    idea.onclick = () => { $("prompt").value = text; $("prompt").focus(); };
    return idea;
  }));
  showExperts($("experts"));
  showExperts($("card-experts"));
  const variant = card.variant === "couple" ? "Couple: a frozen vision-language model, and beside each of its layers one that draws"
    : card.variant === "blend" ? "Blend: the vision-language model's own layers read and draw" : card.variant;
  $("lead").textContent = `${variant}. ${card.layers} layers in ${card.groups.length} groups; ` +
    "each group draws during its own interval of flow time, from noise at 0 to the picture at 1.";
  $("groups").tBodies[0].replaceChildren(...card.groups.map((group, i) => {
    const row = make("tr", {}, make("td", {}, make("i"), String(i + 1)), make("td", { textContent: group.layers.join("–") }),
      make("td", { textContent: group.interval.join(" to ") }));
    row.style.setProperty("--hue", hue(i));
    return row;
  }));
  list($("geometry"), [
    ["Pictures", `${card.image_size} × ${card.image_size} pixels, ${card.image_tokens} tokens`],
    ["Latents", card.latent_shape.join(" × ")], ["Width", `${card.width}, ${card.heads} heads`],
    ["Vocabulary", card.vocabulary.toLocaleString("en")], ["Residual attention", card.residual_attention],
    ["Precision", card.dtype], ["Trained", card.step ? `${card.step.toLocaleString("en")} steps` : "an export"],
    ["A prompt", `at most ${card.limits.prompt_tokens} tokens`],
    ["A conversation", `at most ${card.limits.context_tokens.toLocaleString("en")} tokens`]]);
  const scores = Object.entries(card.scores);
  list($("scores"), scores.length ? scores.map(([name, value]) => [scoreName(name), scoreValue(name, value)])
    : [["None yet", "the run has not ended"]]);
}

async function load() {
  try {
    card = await (await call("/card")).json();
  } catch (error) {
    say($("drawing-status"), error.message, true);
    return;
  }
  $("key").hidden = true;
  say($("drawing-status"), "");
  showCard();
}

// ---- What users do

function show() {
  const wanted = ["draw", "ask", "model"].find((name) => location.hash === `#${name}`) ?? "draw";
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== wanted;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${wanted}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  scrollTo(0, 0);
  if (wanted === "ask") $("question").focus({ preventScroll: true });
}

$("drawing").addEventListener("submit", (event) => {
  event.preventDefault();
  if (drawing) drawing.abort();
  else if (card) draw();
});
$("asking").addEventListener("submit", (event) => {
  event.preventDefault();
  if (asking) asking.abort();
  else ask();
});
$("send").addEventListener("click", (event) => {
  if (!asking) return; // an empty question must not keep a running answer from being stopped
  event.preventDefault();
  asking.abort();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!asking) $("asking").requestSubmit();
});
$("new").onclick = () => {
  asking?.abort();
  messages = [];
  attached = [];
  showAttached();
  $("turns").replaceChildren();
  say($("asking-status"), "");
  $("question").focus();
};
$("file").onchange = () => { readFiles($("file").files); $("file").value = ""; };
$("close").onclick = () => $("large").close();
$("large").addEventListener("click", (event) => { if (event.target === $("large")) $("large").close(); });
$("command").querySelector("button").onclick = async (event) => {
  const code = $("command").querySelector("code");
  try {
    await navigator.clipboard.writeText(code.textContent);
    event.target.textContent = "Copied";
    setTimeout(() => { event.target.textContent = "Copy"; }, 1500);
  } catch {
    getSelection().selectAllChildren(code); // no access to the clipboard: to be copied by hand
  }
};
$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key-value").value);
  load();
});
document.addEventListener("paste", (event) => { if (!$("ask").hidden) readFiles(event.clipboardData.files); });
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  location.hash = "ask";
  readFiles(event.dataTransfer.files);
});
addEventListener("hashchange", show);

restore();
show();
load();
