"The page in a real browser, and the shipped demo: the same text as Python, at a constant cost, by the page's own button."
import json, math, os, queue, re, shutil, signal, subprocess, threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
import pytest, quickjs, torch
from nbdev.doclinks import nbglob
from resnet_bk import browser
from resnet_bk.browser import export_browser, read_browser_page
from resnet_bk.data import ByteTokenizer, get_tokenizer
from resnet_bk.model import ModelConfig, ResNetBK

top = Path(__file__).resolve().parents[1]
demo = top/'nbs'/'demo'
chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'))), None)
in_chromium = pytest.mark.skipif(chromium is None, reason='no chromium, chromium-browser or google-chrome on the PATH: '
                                 'the page itself is not checked here (decoder.js is, in quickjs, by 16b_browser)')

class Answers(BaseHTTPRequestHandler): # a page opened from a file has no other way to say something while its clock runs
    def do_POST(self):
        self.server.answers.put(self.rfile.read(int(self.headers['Content-Length'])))
        self.send_response(204)
        self.end_headers()
    def log_message(self, *args): pass

@contextmanager
def listening():
    server = HTTPServer(('127.0.0.1', 0), Answers)
    server.answers = queue.Queue()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield server
    finally:
        server.shutdown()
        server.server_close()

def visit(folder, tmp_path, script, page=False, query='', *flags, guard=True):
    "Opens a copy of a folder's page (or decoder and model alone) from a file, runs `script` there and returns what it gives to `answer`."
    site = tmp_path/'site'
    shutil.copytree(folder, site, dirs_exist_ok=True)
    with listening() as server:
        tell = f"const answer = x => fetch('http://127.0.0.1:{server.server_port}/', {{method: 'POST', mode: 'no-cors', body: JSON.stringify(x)}});"
        if guard: tell += "addEventListener('error', e => answer({error: e.message})); addEventListener('unhandledrejection', e => answer({error: String(e.reason)}));"
        scripts = ''.join(f'<script src="{n}"></script>' for n in ('model.js', 'decoder.js'))
        body = (folder/'index.html').read_text() if page else f'<meta charset="utf-8"><main></main>{scripts}'
        (site/'visit.html').write_text(body.replace('<main>', f'<script>{tell}</script><main>') + f'<script>{script}</script>')
        cmd = [chromium, '--headless', '--no-sandbox', '--disable-gpu', '--remote-debugging-port=0', f'--user-data-dir={tmp_path}/profile', *flags, f'file://{site}/visit.html{query}']
        run = subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try: answer = json.loads(server.answers.get(timeout=180))
        finally:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    assert not (isinstance(answer, dict) and 'error' in answer), answer
    return answer

DRIVE = '''
const wait = ms => new Promise(done => setTimeout(done, ms));
const until = async f => { for (let i = 0; i < 2000 && !f(); i++) await wait(20); if (!f()) throw new Error('waited in vain: ' + f); };
const type = text => { $('prompt').value = text; $('prompt').dispatchEvent(new Event('input')); };
const idle = () => $('go').textContent === 'Generate';
const state = () => ({shown: $('text').textContent, note: $('note').textContent, numbers: $('numbers').textContent, reach: $('reach').textContent,
  aria: $('strip').getAttribute('aria-label'), wide: document.documentElement.scrollWidth, inner: innerWidth, button: $('go').textContent});
'''

# the demo, without a browser

def test_the_demo_is_what_the_package_writes():
    files = {'index.html': browser.HTML_PAGE, 'page.css': browser.CSS_PAGE, 'page.js': browser.JS_PAGE, 'decoder.js': browser.JS_DECODER}
    for n,text in files.items(): assert (demo/n).read_text(encoding='utf8') == text.strip() + '\n', f'nbs/demo/{n} is of an older version: run export_browser'
    assert {p.name for p in demo.iterdir()} == {*files, 'model.js'}
    assert sum(p.stat().st_size for p in demo.iterdir()) <= 1_000_000

def test_the_site_ships_the_demo():
    resources = re.search(r'  resources:\n((?:    - .*\n)+)', (top/'_quarto.yml').read_text())[1]
    assert '- demo\n' in resources and '(demo/index.html)' in (top/'nbs'/'16b_browser.ipynb').read_text()
    taken = {p.relative_to(top/'nbs').as_posix() for p in nbglob(top/'nbs', file_glob='', as_path=True)}          # what nbdev hands to Quarto
    assert {f'demo/{p.name}' for p in demo.iterdir()} | {'images/hero.png'} <= taken

def test_the_demo_says_what_it_is():
    model, tok, h = read_browser_page(demo)
    assert h['params'] == model.n_params() == 519_816 and f'{h["params"]:,} parameters' in h['about']['text']
    assert tok.vocab_size == 66 and re.search(r'trained for 12 minutes.*public domain.*2\.15 bits per character.*3\.59', h['about']['text'])

def test_the_demo_in_quickjs():
    model, tok, _ = read_browser_page(demo)
    js, ids = quickjs.Context(), tok.encode('JULIET:\nO Rom').tolist()
    js.eval((demo/'model.js').read_text() + (demo/'decoder.js').read_text())
    got = json.loads(js.eval(f'(() => {{ const d = new Decoder(readModel(fromBase64(MODEL))); return JSON.stringify({ids}.map(i => Array.from(d.step(i)))); }})()'))
    with torch.no_grad(): assert (torch.tensor(got) - model(torch.tensor([ids]))[0]).abs().max() < 1e-4

# the decoder in Chromium

WRITE = '''
const model = readModel(fromBase64(MODEL)), tok = makeTokenizer(model.tokenizer);
answer(PROMPTS.map(prompt => {
  const d = new Decoder(model), ids = tok.encode(prompt).ids.slice(), all = [];
  let logits;
  for (const id of ids) logits = d.step(id);
  for (let n = 0; n < 500; n++) {
    all.push(Array.from(logits));
    ids.push(new Sampler(0).draw(logits, 0));
    logits = d.step(ids[ids.length - 1]);
  }
  return {ids, all};
}));'''
@in_chromium
def test_greedy_text_is_pythons(tmp_path):
    model, tok, _ = read_browser_page(demo)
    prompts = ['ROMEO:\n', 'KING HENRY VI:\nBut', '\n', 'Zounds! q é 漢']
    for prompt,r in zip(prompts, visit(demo, tmp_path, WRITE.replace('PROMPTS', json.dumps(prompts)))):
        x = torch.tensor(tok.encode(prompt))[None]
        want, got = model.generate(x, 500, temperature=0), torch.tensor(r['all'], dtype=torch.float64)
        with torch.no_grad(): error = (got - model(want)[0,x.shape[1]-1:-1]).abs().max()
        best = got.topk(2).values
        assert error < 1e-4 and (best[:,0] - best[:,1]).min() > 2*error and r['ids'] == want[0].tolist(), f'{prompt}: logits differ by {error}'

@in_chromium
def test_the_cost_of_a_token_is_flat(tmp_path):
    script = '''
    const model = readModel(fromBase64(MODEL)), s = new Sampler(1), ids = [1], d = new Decoder(model);
    const write = (d, n) => { const t = performance.now(); for (let i = 0; i < n; i++) ids.push(s.draw(d.step(ids[ids.length - 1]), 1)); return (performance.now() - t) / n; };
    const size = d.stateSize;
    write(d, 10000);
    const ms = Array.from({length: 100}, () => [write(d, 20), write(new Decoder(model), 20)]);                     // late and early in turns: a machine is not equally fast at all times
    answer({ms, sizes: [size, d.stateSize], ids, finite: [...d.logits].every(Number.isFinite)});'''
    r = visit(demo, tmp_path, script)
    late, early = (min(t) for t in zip(*r['ms']))
    assert r['sizes'] == [15_748]*2 and r['finite'] and len(set(r['ids'])) > 40
    assert late < 1.5*early, f'{early:.2f} ms a token at the beginning, {late:.2f} ms after 10,000'                # a cache of what was read would cost twenty times as much

# the page

@in_chromium
def test_the_button_writes_what_python_writes(tmp_path):
    model, tok, h = read_browser_page(demo)
    said = visit(demo, tmp_path, DRIVE + '''(async () => {
      $('length').value = 120; $('seed').value = 7; $('temperature').value = 0.7;
      type('JULIET:\\nMy'); $('go').click(); await wait(0); const during = $('go').textContent; await until(idle); const first = state();
      $('go').click(); await until(idle); const again = state();
      $('temperature').value = 0; $('go').click(); await until(idle);
      answer({during, first, again, greedy: state(), title: document.title, about: $('about').textContent, spans: [...$('text').children].slice(0, 3).map(s => s.title)});
    })();''', True)
    x = torch.tensor(tok.encode('JULIET:\nMy'))[None]
    write = lambda **kw: tok.decode(model.generate(x, 120, **kw)[0])
    assert said['during'] == 'Stop' and said['first']['button'] == 'Generate'
    assert said['first']['shown'] == said['again']['shown'] == write(temperature=.7, seed=7) and said['greedy']['shown'] == write(temperature=0)
    assert (said['title'], said['about']) == (h['about']['title'], h['about']['text'])
    assert said['first']['numbers'].startswith('130 tokens') and said['first']['note'] == ''
    with torch.no_grad(): bits = -model(x)[0].log_softmax(-1)[[0, 1], x[0,1:3]]/torch.log(torch.tensor(2.))
    assert said['spans'] == ['the first token has no forecast', *(f'{b:.1f} bits' for b in bits.tolist())]

@in_chromium
def test_typing_stopping_and_odd_prompts(tmp_path):
    said = visit(demo, tmp_path, DRIVE + '''(async () => {
      const out = {}, read = async text => { type(text); await until(() => fed.length === [...text].length && $('text').textContent === text); return state(); };
      out.grown = await read('To be'); const one = decoder;
      await read('To be, or'); out.kept = decoder === one;
      out.unknown = await read('To bé 漢, <b>or</b>');
      out.changed = decoder !== one;
      out.tab = (await read('a\\tb')).note;
      out.nothing = await read('');
      $('length').value = 40; $('go').click(); await until(idle); out.empty = state();
      $('length').value = 20000; $('go').click(); await until(() => fed.length > 50); $('go').click(); const at = fed.length; await wait(200);
      out.stopped = {more: fed.length - at, ...state()};
      $('go').click(); await until(() => fed.length > 50); type('Or type'); await wait(200); out.typed = state();
      answer(out);
    })();''', True)
    assert said['kept'] and said['changed'] and said['grown']['note'] == ''
    assert 'never seen é 漢' in said['unknown']['note'] and said['unknown']['shown'] == 'To bé 漢, <b>or</b>'
    assert 'never seen U+0009 and' in said['tab']
    assert said['nothing']['reach'] == 'There is no earlier token.' and said['nothing']['numbers'].startswith('0 tokens')
    assert 'after a line break' in said['empty']['note'] and len(said['empty']['shown']) == 40
    assert said['stopped']['more'] == 0 and said['stopped']['button'] == 'Generate'
    assert said['typed']['shown'] == 'Or type' and said['typed']['button'] == 'Generate'
    assert 'half comes from the last' in said['grown']['reach'] and said['grown']['reach'] in said['grown']['aria']

@in_chromium
def test_the_strip_shows_the_influence(tmp_path):
    said = visit(demo, tmp_path, DRIVE + '''(async () => {
      type('What light is this'); await until(() => $('text').textContent.length === 18);
      const c = $('strip'), pen = c.getContext('2d'), s = c.width / c.clientWidth, out = {};
      for (const layer of [1, 2]) {
        $('layer').value = layer; $('layer').dispatchEvent(new Event('change'));
        const at = back => [...pen.getImageData((c.clientWidth - 4 - 12 * back - 2.5) * s, 10 * s, 1, 1).data];
        out[layer] = {alpha: Array.from({length: 18}, (_, i) => at(i)[3] / 255), values: Array.from(influence(layersOf(decoder)[layer].chains)), names: [...$('layer').options].map(o => o.text)};
      }
      answer(out);
    })();''', True)
    for layer in '12':
        v, alpha = torch.tensor(said[layer]['values']), torch.tensor(said[layer]['alpha'])
        want = .75*(1 + (v/v.max()).log10()/3).clamp(min=0)
        assert (alpha - want).abs().max() < .01 and 0 < alpha.min() + .2 and alpha[0] == alpha.max() and alpha.std() > .05
    assert said['1']['names'] == ['layer 1, attention, heads: 2', *(f'layer {i}, resolvent, chains: {n}' for i,n in ((1, 128), (2, 256), (3, 256)))]

@in_chromium
@pytest.mark.parametrize('width', [390, 1280])
def test_the_page_fits_the_screen(tmp_path, width):
    frame = tmp_path/'frame'
    shutil.copytree(demo, frame)
    (frame/'index.html').write_text('<main></main>' + f'<iframe src="page.html#prompt=To be&seed=3&temperature=0.35&length=30&go=1" style="width:{width}px;height:900px"></iframe>')
    (frame/'page.html').write_text((demo/'index.html').read_text() + '''<script>setTimeout(() => parent.postMessage({wide: document.documentElement.scrollWidth, inner: innerWidth, fed: fed.length,
      text: $('text').textContent, small: [...document.querySelectorAll('input, select, textarea, button, canvas, #text')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.id),
      unnamed: [...document.querySelectorAll('input, select, textarea')].filter(e => !(e.labels.length && e.labels[0].textContent.trim())).map(e => e.id)}, '*'), 3000)</script>''')
    said = visit(frame, tmp_path, "addEventListener('message', e => answer(e.data));", True, '', f'--window-size={width + 100},1000')
    assert said['wide'] <= said['inner'] == width and said['small'] == [] and said['unnamed'] == []
    assert said['fed'] == 35 and said['text'].startswith('To be')                                  # the address said so

@in_chromium
@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_pages_of_other_vocabularies(tmp_path, kind):
    torch.manual_seed(0)
    tok = ByteTokenizer() if kind == 'bytes' else get_tokenizer('bpe', 'Where art <!-- thou -->, é and 漢, Romeo? '*9, 300)
    model = ResNetBK(ModelConfig(tok.vocab_size, 24, 2, ffn='mlp', tie=True)).eval()
    export_browser(model, tok, tmp_path/'new')
    text = 'Where <!-- thou --> é 漢😀\nis'
    said = visit(tmp_path/'new', tmp_path, DRIVE + f'''(async () => {{
      type({json.dumps(text)}); await until(() => $('text').textContent === {json.dumps(text)});
      const read = {{ids: fed.map(f => f.id), spans: [...$('text').children].map(s => [s.textContent, s.title]), ...state()}}; $('length').value = 60; $('go').click(); await until(idle);
      answer({{read, end: state(), title: document.title, about: $('about').textContent}});
    }})();''', True)
    assert said['read']['ids'] == tok.encode(text).tolist() and said['read']['note'] == ''
    bits, pieces, cost, stream = [None, *(-read_browser_page(tmp_path/'new')[0](torch.tensor([said['read']['ids']]))[0].log_softmax(-1)/math.log(2)).unbind()], [], 0., tok.stream()
    for i,b in zip(said['read']['ids'], bits):                                                                       # a character costs what its tokens cost
        piece, cost = stream.push(i), cost + (0. if b is None else b[i].item())
        if piece: pieces, cost = [*pieces, (piece, cost)], 0.
    assert ''.join(t for t,_ in pieces) == text and [t for t,_ in said['read']['spans']] == [t for t,_ in pieces]
    assert all(abs(float(title.split()[0]) - cost) < .06 for (_,title),(_,cost) in list(zip(said['read']['spans'], pieces))[1:])
    assert kind == 'bytes' or any('<!--' in tok.decode([i]) for i in said['read']['ids'])                      # markup in one token stays text
    assert said['end']['shown'].startswith(text) and 'parameters' in said['about'] and said['title'] == 'A language model in this page'

def damaged(folder):
    export_browser(ResNetBK(ModelConfig(256, 8, 1)), ByteTokenizer(), folder)
    (folder/'model.js').write_text((folder/'model.js').read_text()[:-43] + '";\n')

def test_a_page_that_is_damaged_is_refused(tmp_path):
    damaged(tmp_path)
    with pytest.raises(ValueError, match='the model file holds'): read_browser_page(tmp_path)

@in_chromium
def test_a_page_that_is_damaged_says_so(tmp_path):
    damaged(tmp_path/'new')
    said = visit(tmp_path/'new', tmp_path, "answer(document.getElementById('about').textContent);", True, guard=False)
    assert said.startswith('The model cannot be read. the model file is damaged: ')
