'use strict';
const $ = id => document.getElementById(id);
const model = load(), tokenizer = makeTokenizer(model.tokenizer);
let decoder, logits, fed, turn = 0;
let held;                                        // bits of tokens that are only part of a character
let bits, writes;                                // sums: of all tokens that had a forecast, of time

function load() {
  try {
    return readModel(fromBase64(MODEL));
  } catch (e) {
    $('about').textContent = `The model cannot be read. ${e.message}`;
    throw e;
  }
}
function begin() {                               // a new text
  decoder = new Decoder(model);
  logits = null;
  fed = [];                                      // {id, text, given}
  held = null;
  bits = {sum: 0, n: 0};
  writes = {ms: 0, n: 0};
  $('text').textContent = '';
}

function feed(id, text, given) {
  const cost = logits && surprise(logits, id), t = performance.now();
  logits = decoder.step(id);
  writes.ms += performance.now() - t;
  writes.n++;
  fed.push({id, text, given});
  if (cost !== null) bits = {sum: bits.sum + cost, n: bits.n + 1};
  if (cost !== null) held += cost;
  if (text) show(text, given);
}
function show(text, given) {
  const span = document.createElement('span');
  span.textContent = text;
  if (given) span.className = 'given';
  span.title = held === null ? 'the first token has no forecast' : `${held.toFixed(1)} bits`;
  span.style.setProperty('--heat', Math.min(held / 8, 1).toFixed(3));
  $('text').append(span);
  held = null;
}

// Runs `next` until it answers false, in slices; false if something else began in the meantime
async function inSlices(next) {
  const mine = ++turn;
  for (let more = true; more;) {
    const end = performance.now() + 12, box = $('text');
    const low = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    while (more && performance.now() < end) more = next();
    if (low) box.scrollTop = box.scrollHeight;
    draw();
    await new Promise(done => setTimeout(done));
    if (mine !== turn) return false;
  }
  return true;
}
// What the box holds; only what is new, if the rest was read already
function readPrompt() {
  const {ids, texts, unknown} = tokenizer.encode($('prompt').value);
  const was = (f, i) => f.given && f.id === ids[i] && f.text === texts[i];
  if (fed.length > ids.length || !fed.every(was)) begin();
  const code = c => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, '0')}`;
  const strange = unknown.slice(0, 20).map(c => c.trim() ? c : code(c)).join(' ');
  say(strange && `The model has never seen ${strange} and reads an unknown character there. Your text stays `
      + 'as it is.');
  return inSlices(() => {
    const i = fed.length;
    if (i < ids.length) feed(ids[i], texts[i], true);
    return fed.length < ids.length;
  });
}
function say(text) {
  $('note').textContent = text;
}

async function generate() {
  begin();
  $('go').textContent = 'Stop';
  if (!await readPrompt()) return;
  if (!fed.length) {
    say('Without a beginning, the model begins after a line break.');
    feed(tokenizer.start, '', true);
  }
  const sampler = new Sampler(Math.trunc(Number($('seed').value)) || 0), stream = tokenizer.stream();
  let left = Math.min(20000, Math.trunc(Number($('length').value)) || 0);
  const done = await inSlices(() => {
    if (left-- <= 0) return false;
    const id = sampler.draw(logits, Number($('temperature').value));
    feed(id, stream.push(id), false);
    return true;
  });
  if (done) $('go').textContent = 'Generate';
}
function stop() {
  turn++;
  $('go').textContent = 'Generate';
}

function draw() {
  const per = bits.n ? `${(bits.sum / bits.n).toFixed(2)} bits each` : 'no forecast yet';
  const speed = writes.n ? `, ${(writes.ms / writes.n).toFixed(2)} ms each` : '';
  const count = n => n.toLocaleString('en');
  $('numbers').textContent = `${count(fed.length)} tokens, ${per}${speed}. What the model keeps of them: `
    + `${count(decoder.stateSize)} numbers, however long the text is.`;
  const canvas = $('strip'), style = getComputedStyle(canvas), scale = devicePixelRatio || 1;
  const width = canvas.clientWidth;
  canvas.width = width * scale;
  canvas.height = 60 * scale;
  const pen = canvas.getContext('2d');
  pen.scale(scale, scale);
  pen.textAlign = 'center';
  const all = influence(layersOf(decoder)[$('layer').value || 0].chains);
  const hot = style.getPropertyValue('--hot').trim(), most = Math.max(...all);
  let right = width - 4;
  for (let back = 0; back < all.length; back++) {
    const text = fed[fed.length - 1 - back].text.replace(/\n/g, '↵').replace(/ /g, '␣') || '·';
    const wide = 4 + 8 * [...text].length, middle = right - wide / 2;
    if (right - wide < 4) break;
    right -= wide;
    pen.fillStyle = `rgb(${hot} / ${(.75 * Math.max(0, 1 + Math.log10(all[back] / most) / 3)).toFixed(3)})`;
    pen.fillRect(right, 8, wide - 1, 26);
    pen.fillStyle = style.color;
    pen.font = '13px ui-monospace, monospace';
    pen.fillText(text, middle, 26);
    pen.font = '11px system-ui, sans-serif';
    if (back % 10 === 0) pen.fillText(back ? `−${back}` : 'now', Math.min(middle, width - 14), 50);
  }
  tell(all);
}

// In words: within how many tokens half and nine tenths of the influence of earlier tokens lie
function tell(all) {
  const earlier = all.slice(1), total = earlier.reduce((a, b) => a + b, 0);
  const within = share => {
    let sum = 0;
    return 1 + earlier.findIndex(v => (sum += v) >= share * total * (1 - 1e-12));
  };
  const text = total ? `Of the influence of earlier tokens, half comes from the last ${within(.5)}, `
    + `nine tenths from the last ${within(.9)}.` : 'There is no earlier token.';
  $('reach').textContent = text;
  $('strip').setAttribute('aria-label', `Influence of earlier tokens on the newest. ${text}`);
}

begin();
document.title = $('title').textContent = model.about.title || 'A language model in this page';
const params = model.params.toLocaleString('en');
$('about').textContent = model.about.text || `A ResNet-BK of ${params} parameters.`;
$('prompt').value = model.about.prompt || '';
layersOf(decoder).forEach((l, i) => $('layer').append(new Option(l.name, i)));
$('layer').value = Math.max(0, layersOf(decoder).findIndex(l => l.name.includes('resolvent')));
const degrees = () => $('degrees').textContent = Number($('temperature').value).toFixed(2);
degrees();
$('temperature').addEventListener('input', degrees);
$('layer').addEventListener('change', draw);
addEventListener('resize', draw);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
$('prompt').addEventListener('input', () => {
  stop();
  readPrompt();
});
$('form').addEventListener('submit', e => {
  e.preventDefault();
  if ($('go').textContent === 'Stop') stop();
  else generate();
});
const asked = new URLSearchParams(location.hash.slice(1));    // e.g. page.html#prompt=To be&seed=3&go=1
for (const name of ['prompt', 'temperature', 'seed', 'length'])
  if (asked.has(name)) $(name).value = asked.get(name);
degrees();
if (asked.has('go')) generate();
else readPrompt();
