'use strict';
function fromBase64(text) {
  return Uint8Array.from(atob(text), c => c.charCodeAt(0));
}
// The header of a model file, with the tensors as views of it: {shape, data, scale}, scale null for float32
function readModel(bytes) {
  const wrong = what => new Error(`the model file is damaged: ${what}`);
  bytes = bytes.slice();                        // at the start of a buffer, so that places are aligned
  let ascii = '';
  const read = end => {
    for (let i = ascii.length; i < end; i++) ascii += String.fromCharCode(bytes[i]);
    return ascii;
  };
  if (bytes.length < 8 || read(4) !== 'RBK1') throw wrong('it does not begin as it should');
  const start = 8 + new DataView(bytes.buffer).getUint32(4, true);
  if (start > bytes.length) throw wrong('it is cut short');
  const header = JSON.parse(read(start).slice(8));
  if (bytes.length !== start + header.size) throw wrong(`${bytes.length} bytes of ${start + header.size}`);
  const tensors = {};
  for (const [name, t] of Object.entries(header.tensors)) {
    const n = t.shape.reduce((a, b) => a * b, 1), codes = 'scale' in t;
    const data = new (codes ? Int8Array : Float32Array)(bytes.buffer, start + t.at, n);
    const scale = codes ? new Float32Array(bytes.buffer, start + t.scale, t.shape[0]) : null;
    tensors[name] = {shape: t.shape, data, scale};
  }
  return {...header, tensors};
}

// out = W x, or out += W x
function matvec(out, w, x, add = false) {
  const [rows, cols] = w.shape, q = w.data, even = cols - cols % 4;
  for (let r = 0, p = 0; r < rows; r++) {
    let a = 0, b = 0, c = 0, d = 0, i = 0;
    for (; i < even; i += 4, p += 4) {
      a += q[p] * x[i];
      b += q[p + 1] * x[i + 1];
      c += q[p + 2] * x[i + 2];
      d += q[p + 3] * x[i + 3];
    }
    for (; i < cols; i++, p++) a += q[p] * x[i];
    const y = (a + b + c + d) * (w.scale ? w.scale[r] : 1);
    out[r] = add ? out[r] + y : y;
  }
}
const sigmoid = x => 1 / (1 + Math.exp(-x));
const silu = x => x * sigmoid(x);
const softplus = x => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
function erf(x) {
  const a = Math.abs(x);
  if (a > 6) return Math.sign(x);
  let term = a, sum = a;
  for (let n = 1; term > 1e-17 * sum; n++) sum += term *= 2 * a * a / (2 * n + 1);
  return Math.sign(x) * 2 / Math.sqrt(Math.PI) * Math.exp(-a * a) * sum;
}
const gelu = x => x / 2 * (1 + erf(x / Math.SQRT2));

// LayerNorm without a bias; without a weight where `weight` is null
function layerNorm(out, x, weight, eps) {
  let mean = 0, square = 0;
  for (const v of x) mean += v / x.length;
  for (const v of x) square += (v - mean) ** 2;
  const r = 1 / Math.sqrt(square / x.length + eps);
  for (let i = 0; i < x.length; i++) out[i] = (x[i] - mean) * r * (weight ? weight[i] : 1);
}
// One over the root of the mean square of n numbers from place `at` on
function perRms(x, at, n, eps) {
  let square = 0;
  for (let i = at; i < at + n; i++) square += x[i] * x[i];
  return 1 / Math.sqrt(square / n + eps);
}

class Conv {                                    // taps: width rows, newest first
  constructor(taps) {
    [this.width, this.n] = taps.shape;
    this.taps = taps.data;
    this.now = new Float64Array(this.n);
    this.past = new Float64Array((this.width - 1) * this.n);
  }
  step(x) {                                     // the first n numbers of x, in place
    const {n, width, taps, past, now} = this;
    for (let c = 0; c < n; c++) {
      now[c] = x[c];
      x[c] *= taps[c];
      for (let k = 1; k < width; k++) x[c] += taps[k * n + c] * past[(k - 1) * n + c];
    }
    if (width === 1) return;
    past.copyWithin(n, 0, past.length - n);     // one token older
    past.set(now);
  }
}

const REACH = 256;                              // tokens that the picture of influences can look back
class Chains {                                  // pivots g of n chains
  constructor(model, name, n) {
    this.n = n;
    this.E = model.tensors[`${name}.spectrum.E`].data;
    this.eta = Float64Array.from(model.tensors[`${name}.spectrum.log_eta`].data, Math.exp);
    this.re = new Float64Array(n);
    this.im = new Float64Array(n);
    this.sizes = new Float64Array(REACH * n);   // |g| of the last tokens: a ring of rows
    this.seen = 0;
  }
  pivot(c, v, w) {                              // of chain c, one token on: potential v, absorption w
    const re = -2 - this.E[c] + v - this.re[c], im = -(this.eta[c] + w) - this.im[c];
    const m = 1 / (re * re + im * im);
    this.re[c] = re * m;
    this.im[c] = -im * m;
    return this.sizes[this.seen % REACH * this.n + c] = Math.sqrt(m);
  }
  next() {                                      // when all chains have moved
    this.seen++;
  }
}

class Resolvent {
  constructor(model, part) {
    const of = name => model.tensors[`${part.name}.${name}`], data = name => of(name)?.data;
    Object.assign(this, {inProj: of('in_proj.weight'), outProj: of('out_proj.weight'), scale: data('scale'),
      bias: data('absorb_bias'), norm: data('norm.weight'), eps: model.norms[`${part.name}.norm`],
      features: part.features, absorb: part.absorb, potential: part.potential, vMax: part.v_max,
      conv: of('conv.taps') ? new Conv(of('conv.taps')) : null});
    const C = this.scale.length;
    this.chains = new Chains(model, part.name, C);
    this.h = new Float64Array(this.inProj.shape[0]);
    this.y = new Float64Array(part.features * C);
    this.re = new Float64Array(C);              // the mixed values
    this.im = new Float64Array(C);
  }
  step(x, out) {                                // out += the mixer's answer to x
    const {h, y, chains, features: f} = this, C = chains.n, gate = h.length - C;
    matvec(h, this.inProj, x);
    if (this.conv) this.conv.step(h);
    for (let c = 0; c < C; c++) this.site(c, h, C);
    chains.next();
    const r = perRms(y, 0, y.length, this.eps);
    for (let i = 0; i < y.length; i++) y[i] *= r * this.norm[i] * silu(h[gate + (i - i % f) / f]);
    matvec(out, this.outProj, y, true);
  }

  site(c, h, C) {                               // one token on along chain c
    const {chains, features: f} = this;
    const u = (this.conv ? silu(h[c]) : h[c]) * this.scale[c];
    const w = this.absorb ? softplus(h[C + c] + this.bias[c]) : 0;
    const v = this.potential ? this.vMax * Math.tanh(h[(this.absorb ? 2 : 1) * C + c]) : 0;
    chains.pivot(c, v, w);
    const gr = chains.re[c], gi = chains.im[c], a = u - this.re[c], b = -this.im[c];
    this.y[c * f] = this.re[c] = gr * a - gi * b;
    this.im[c] = gr * b + gi * a;
    if (f === 2) this.y[c * f + 1] = this.im[c];
  }
}

class Attention {
  constructor(model, part) {
    const of = name => model.tensors[`${part.name}.${name}`], data = name => of(name)?.data;
    Object.assign(this, {inProj: of('in_proj.weight'), outProj: of('out_proj.weight'),
      absorbProj: of('absorb_proj.weight'), bias: data('absorb_bias'), norm: data('norm.weight'),
      eps: model.norms[`${part.name}.norm`], heads: part.heads,
      conv: of('conv.taps') ? new Conv(of('conv.taps')) : null});
    const D = this.outProj.shape[0], d = D / part.heads;
    this.chains = new Chains(model, part.name, part.heads);
    this.h = new Float64Array(4 * D);           // q | k | v | gate
    this.w = new Float64Array(part.heads);
    this.y = new Float64Array(D);
    this.S = Array.from({length: part.heads}, () => new Float64Array(d * d));
  }
  step(x, out) {
    matvec(this.h, this.inProj, x);
    matvec(this.w, this.absorbProj, x);
    if (this.conv) this.conv.step(this.h);
    for (let i = 0; i < 3 * this.y.length; i++) this.h[i] = silu(this.h[i]);
    for (let head = 0; head < this.heads; head++) this.head(head, this.y.length, this.y.length / this.heads);
    this.chains.next();
    matvec(out, this.outProj, this.y, true);
  }

  unit(at, d) {                                 // to length one
    let square = 0;
    for (let i = at; i < at + d; i++) square += this.h[i] ** 2;
    const r = 1 / Math.max(Math.sqrt(square), 1e-12);
    for (let i = at; i < at + d; i++) this.h[i] *= r;
  }
  head(head, D, d) {
    const {h, y} = this, S = this.S[head], q = head * d, k = q + D, v = k + D, gate = v + D;
    this.unit(q, d);
    this.unit(k, d);
    const keep = this.chains.pivot(head, 0, softplus(this.w[head] + this.bias[head]));
    y.fill(0, q, q + d);
    for (let i = 0; i < d; i++)
      for (let j = 0; j < d; j++) {
        S[i * d + j] = keep * (S[i * d + j] + h[k + i] * h[v + j]);
        y[q + j] += S[i * d + j] * h[q + i];
      }
    const r = perRms(y, q, d, this.eps);
    for (let j = 0; j < d; j++) y[q + j] *= r * this.norm[j] * silu(h[gate + j]);
  }
}

const MIXERS = {resolvent: Resolvent, attention: Attention};
class Decoder {
  constructor(model) {
    const of = name => model.tensors[name];
    this.model = model;
    this.table = of('embed.weight');
    this.head = of('head.weight') || this.table;
    this.bias = of('head.bias').data;
    const [V, D] = this.table.shape;
    Object.assign(this, {x: new Float64Array(D), xn: new Float64Array(D), logits: new Float64Array(V)});
    this.blocks = model.blocks.map(b => ({...b, mixers: b.mixers.map(p => new MIXERS[p.kind](model, p)),
      up: of(`${b.name}.ffn.0.weight`), down: of(`${b.name}.ffn.2.weight`)}));
    for (const b of this.blocks) if (b.ffn) b.h = new Float64Array(b.up.shape[0]);
  }
  embed(id) {
    const {x, table, model} = this, D = x.length;
    if (!(Number.isInteger(id) && id >= 0 && id < table.shape[0]))
      throw new RangeError(`token ids lie in 0 … ${table.shape[0] - 1}; got ${id}`);
    for (let i = 0; i < D; i++) x[i] = table.data[id * D + i] * (table.scale ? table.scale[id] : 1);
    if (model.tie) layerNorm(x, x, null, 1e-5);
  }
  normed(name) {
    layerNorm(this.xn, this.x, this.model.tensors[`${name}.weight`].data, this.model.norms[name]);
    return this.xn;
  }

  step(id) {                                    // one token in, the logits of the next one out
    const {x, logits} = this;
    this.embed(id);
    for (const b of this.blocks) {
      const xn = this.normed(`${b.name}.norm1`);
      for (const m of b.mixers) m.step(xn, x);
      if (!b.ffn) continue;
      matvec(b.h, b.up, this.normed(`${b.name}.norm2`));
      for (let i = 0; i < b.h.length; i++) b.h[i] = gelu(b.h[i]);
      matvec(x, b.down, b.h, true);
    }
    matvec(logits, this.head, this.normed('norm'));
    for (let i = 0; i < logits.length; i++) logits[i] += this.bias[i];
    return logits;                              // of this decoder: the next step overwrites them
  }
  get stateSize() {                             // numbers that stand for all that was read
    const of = m => 2 * m.chains.n + (m.conv ? m.conv.past.length : 0) + (m.S ? m.S.length * m.S[0].length
                                                                              : 2 * m.re.length);
    return this.blocks.flatMap(b => b.mixers).reduce((sum, m) => sum + of(m), 0);
  }
}

class Utf8 {                                    // bytes in, text out as soon as it is certain
  constructor() {
    this.need = 0;
  }
  push(byte) {
    if (this.need === 0) return this.first(byte);
    if (byte < this.low || byte > this.high) {
      this.need = 0;
      return '\ufffd' + this.first(byte);
    }
    this.code = this.code << 6 | byte & 63;
    [this.low, this.high] = [0x80, 0xbf];
    return --this.need ? '' : String.fromCodePoint(this.code);
  }
  first(byte) {
    if (byte < 0x80) return String.fromCharCode(byte);
    if (byte < 0xc2 || byte > 0xf4) return '\ufffd';
    this.need = byte < 0xe0 ? 1 : byte < 0xf0 ? 2 : 3;
    this.code = byte & (0x3f >> this.need);
    this.low = {0xe0: 0xa0, 0xf0: 0x90}[byte] || 0x80;    // no longer form than needed, no surrogate,
    this.high = {0xed: 0x9f, 0xf4: 0x8f}[byte] || 0xbf;   // nothing beyond Unicode
    return '';
  }
  flush() {
    return this.need ? (this.need = 0, '\ufffd') : '';
  }
}

function utf8Bytes(text) {
  return [...text].flatMap(ch => {
    let c = ch.codePointAt(0);
    if (c >= 0xd800 && c < 0xe000) c = 0xfffd;            // half of a surrogate pair
    if (c < 0x80) return c;
    if (c < 0x800) return [0xc0 | c >> 6, 0x80 | c & 63];
    if (c < 0x10000) return [0xe0 | c >> 12, 0x80 | c >> 6 & 63, 0x80 | c & 63];
    return [0xf0 | c >> 18, 0x80 | c >> 12 & 63, 0x80 | c >> 6 & 63, 0x80 | c & 63];
  });
}
class Bytes {
  constructor() {
    this.start = 10;                            // what a text begins with that begins with nothing
  }
  stream() {
    return new Utf8();
  }
  encode(text) {
    const ids = utf8Bytes(text), stream = this.stream();
    return {ids, texts: ids.map(i => stream.push(i)), unknown: []};
  }
}

class Chars {
  constructor({vocab}) {
    this.chars = ['\ufffd', ...vocab];
    this.ids = new Map(vocab.map((c, i) => [c, i + 1]));
    this.start = this.ids.get('\n') || 0;
  }
  stream() {
    return {push: id => this.chars[id], flush: () => ''};
  }
  encode(text) {
    const texts = [...text];
    const unknown = [...new Set(texts.filter(c => !this.ids.has(c)))];
    return {ids: texts.map(c => this.ids.get(c) || 0), texts, unknown};
  }
}

const LINE = /[^]*?(?:\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029])|[^]+$/g;
const WORD = new RegExp("'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+|"
                        + '\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+', 'gu');
class Pairs {
  constructor({vocab, merges}) {
    const shown = b => b > 32 && b < 127 || b > 160 && b !== 173;
    let other = 256;
    this.letters = Array.from({length: 256}, (_, b) => String.fromCharCode(shown(b) ? b : other++));
    this.bytes = new Map(this.letters.map((c, b) => [c, b]));
    this.vocab = vocab;
    this.ids = new Map(vocab.map((t, i) => [t, i]));
    this.ranks = new Map(merges.map((pair, i) => [pair.join(' '), i]));
    this.start = this.ids.get(this.letters[10]);
  }
  word(text) {
    const parts = utf8Bytes(text).map(b => this.letters[b]);
    for (;;) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(parts[i] + ' ' + parts[i + 1]);
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return parts.map(p => this.ids.get(p));
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }

  stream() {
    const utf8 = new Utf8(), push = id => [...this.vocab[id]].map(c => utf8.push(this.bytes.get(c))).join('');
    return {push, flush: () => utf8.flush()};
  }
  encode(text) {
    const words = (text.match(LINE) || []).flatMap(line => line.match(WORD) || []);
    const ids = words.flatMap(w => this.word(w)), stream = this.stream();
    return {ids, texts: ids.map(i => stream.push(i)), unknown: []};
  }
}
const makeTokenizer = spec => new ({bytes: Bytes, chars: Chars, bpe: Pairs}[spec.kind])(spec);

class Sampler {
  constructor(seed) {
    this.state = BigInt.asUintN(64, BigInt(seed));
  }
  uniform() {                                   // in [0, 1)
    const u64 = x => BigInt.asUintN(64, x);
    let z = this.state = u64(this.state + 0x9E3779B97F4A7C15n);
    z = u64((z ^ z >> 30n) * 0xBF58476D1CE4E5B9n);
    z = u64((z ^ z >> 27n) * 0x94D049BB133111EBn);
    return Number((z ^ z >> 31n) >> 11n) * 2 ** -53;
  }
  draw(logits, temperature) {                   // a token; at temperature 0 the likeliest
    let best = 0;
    for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
    if (temperature === 0) return best;
    const p = Array.from(logits, l => Math.exp((l - logits[best]) / temperature));
    let u = this.uniform() * p.reduce((a, b) => a + b);
    for (let i = 0; i < p.length; i++) if ((u -= p[i]) < 0) return i;
    return best;                                // rounding
  }
}
function surprise(logits, id) {                 // bits
  let top = -Infinity, sum = 0;
  for (const l of logits) top = Math.max(top, l);
  for (const l of logits) sum += Math.exp(l - top);
  return (Math.log(sum) + top - logits[id]) / Math.LN2;
}

function influence(chains) {                    // mean |G_ij| over the chains, newest j first
  const {n, seen, sizes} = chains, product = new Float64Array(n).fill(1);
  return Float64Array.from({length: Math.min(seen, REACH)}, (_, back) => {
    const row = (seen - 1 - back) % REACH * n;
    let sum = 0;
    for (let c = 0; c < n; c++) sum += product[c] *= sizes[row + c];
    return sum / n;
  });
}
function layersOf(decoder) {                    // what there is to look at: {name, chains}
  return decoder.blocks.flatMap((b, i) => b.mixers.map((m, j) => {
    const kind = model => model instanceof Attention ? 'attention, heads' : 'resolvent, chains';
    return {name: `layer ${i + 1}, ${kind(m)}: ${m.chains.n}`, chains: m.chains};
  }));
}
