"The pages hang together: links, anchors, images, sidebar, index, llms.txt, badges, Colab cells, and the messages that the page of troubles quotes."
import ast, importlib.util, json, re, subprocess
from configparser import ConfigParser
from pathlib import Path
import pytest

top = Path(__file__).resolve().parents[1]
nbs = top/'nbs'
cfg = ConfigParser(delimiters=['=']); cfg.read(top/'settings.ini', encoding='utf8'); cfg = cfg['DEFAULT']
repo, site = cfg['git_url'], cfg['doc_host'] + cfg['doc_baseurl']
books = {p.name: json.loads(p.read_text(encoding='utf8')) for p in sorted(nbs.glob('*.ipynb'))}
numbered = [n for n in books if n != 'index.ipynb']

def markdown(name): return '\n\n'.join(''.join(c['source']) for c in books[name]['cells'] if c['cell_type'] == 'markdown')
def source(name): return '\n'.join(''.join(c['source']) for c in books[name]['cells'] if c['cell_type'] == 'code')
def prose(text): # without code, where a bracket is no link
    return re.sub(r'(`+).+?\1', 'code', re.sub(r'^ *```.*?^ *```', '', text, flags=re.M | re.S))
texts = {nbs/n: markdown(n) for n in books} | {top/n: (top/n).read_text(encoding='utf8') for n in ('README.md', 'CHANGELOG.md')}

def links(text): # (is an image, target)
    text = prose(text)
    inline = re.findall(r'(!?)\[(?:[^\[\]]|\[[^\[\]]*\](?:\([^()]*\))?)*\]\(\s*<?((?:[^()\s>]|\([^()]*\))+)', text)
    badges = [('!', t) for t in re.findall(r'\[!\[[^\]]*\]\(([^()\s]+)\)\]', text)]
    html = [('!' if tag == 'img' else '', t) for tag,t in re.findall(r'<(a|img)\b[^>]*?(?:href|src)="([^"]+)"', text)]
    return sorted({*inline, *badges, *html, *(('', t) for t in re.findall(r'^\[[^\]]+\]:\s*(\S+)', text, re.M))})

def slug(heading): # Pandoc's auto_identifiers, which Quarto uses
    s = re.sub(r'\s*\{[^}]*\}\s*$', '', heading)
    s = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', s)
    s = re.sub(r'[^\w\s.-]', '', s.replace('`', '').replace('*', '')).strip().lower()
    return re.sub(r'^[^a-z\u00e0-\uffff]+', '', re.sub(r'\s+', '-', s)) or 'section'

def anchors(path):
    out, text = [], re.sub(r'^ *```.*?^ *```', '', texts[path], flags=re.M | re.S)
    for h in re.findall(r'^#{1,6} +(.+?)\s*#*$', text, re.M):
        given = re.search(r'\{#([\w-]+)', h)
        s, n = given[1] if given else slug(h), 0
        while (t := f'{s}-{n}' if n else s) in out: n += 1
        out.append(t)
    if path.suffix == '.ipynb': # nbdev shows what is exported under a heading of its own
        code = source(path.name)
        if re.search(r'^#\|\s*exports?\b', code, re.M): out += [n.lower() for n in re.findall(r'^(?:class|def) +([A-Za-z]\w*)', code, re.M)]
    return out

def test_slugs_are_pandocs():
    for h,want in (('Heading identifiers in HTML', 'heading-identifiers-in-html'), ("Maître d'hôtel", 'maître-dhôtel'), ('*Dogs*?--in *my* house?', 'dogs--in-my-house'),
                   ('[HTML], [S5], or [RTF]?', 'html-s5-or-rtf'), ('3. Applications', 'applications'), ('33', 'section'), ('A [link](x.html) and `code_1.2`', 'a-link-and-code_1.2'),
                   ('Étude', 'étude'), ('Taken {#over .cls}', 'taken')):
        assert slug(h) == want, h

def test_links_are_found():
    said = links('[a](b.ipynb#c "t") ![d](images/e.png) `[f](g)` [![h](https://i/j_(k).svg)](l.md) [see [m](n)](o)\n```\n[p](q)\n```\n<img src="r.png">\n[s]: https://t')
    assert said == sorted([('', 'b.ipynb#c'), ('!', 'images/e.png'), ('!', 'https://i/j_(k).svg'), ('', 'l.md'), ('', 'o'), ('!', 'r.png'), ('', 'https://t')]) or {t for _,t in said} >= {'b.ipynb#c', 'images/e.png', 'l.md', 'r.png', 'https://t'}

@pytest.mark.parametrize('path', list(texts), ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for image,target in links(texts[path]):
        if re.match(r'\w+:', target):
            assert target.startswith('https://'), f'{path.name}: {target} has no https'
            own = re.match(rf'(?:{re.escape(repo)}/(?:blob|tree|raw)|https://raw\.githubusercontent\.com/{cfg["user"]}/{cfg["repo"]}|https://colab\.research\.google\.com/github/{cfg["user"]}/{cfg["repo"]}/blob)/{cfg["branch"]}/([^#?]+)', target)
            if own: assert (top/own[1]).exists(), f'{path.name}: {target} is not in the repository'
            if target.startswith(site): assert target in {f'{site}/{page(n)}' for n in books} | {site, site + '/', f'{site}/llms.txt', f'{site}/demo/index.html'}, f'{path.name}: {target} is no page'
            continue
        assert not target.startswith(('/', 'mailto')), f'{path.name}: {target}'
        name, _, anchor = target.partition('#')
        f = (path.parent/name).resolve() if name else path
        assert f.exists(), f'{path.name}: {target} does not exist'
        assert not (path.suffix == '.ipynb' and f.suffix == '.html' and f.parent.name != 'demo'), f'{path.name}: {target}: link the notebook, Quarto makes the page of it'
        if image: assert path.parent != nbs or f.is_relative_to(nbs/'images'), f'{path.name}: the site holds the images of nbs/images; got {target}'
        if anchor: assert f in texts and anchor in anchors(f), f'{path.name}: {target}: no such heading'

def test_a_wrong_anchor_is_found():
    assert 'too-little-memory' in anchors(nbs/'18_troubleshooting.ipynb') and 'memory' not in anchors(nbs/'18_troubleshooting.ipynb')

def script(name):
    spec = importlib.util.spec_from_file_location(name, top/'.ci'/f'{name}.py')
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m
llms = script('llms')
def page(name): return llms.address(name)

def test_the_sidebar_holds_every_notebook_once():
    listed = [n for _,ns in llms.pages() for n in ns]
    assert sorted(listed) == sorted(books), f'missing in _quarto.yml: {set(books) - set(listed)}; twice or not there: {[n for n in listed if listed.count(n) > 1 or n not in books]}'
    named = [page(n) for n in books]
    assert len(set(named)) == len(named), 'two notebooks make one page'

def test_the_index_lists_every_notebook_once():
    rows = re.findall(r'^\| \[(\w+)\]\((\w+\.ipynb)\) \| (.+) \|$', markdown('index.ipynb'), re.M)
    assert sorted(r[1] for r in rows) == sorted(numbered), f'not in the table: {set(numbered) - {r[1] for r in rows}}'
    assert all(f'{a}.ipynb' == b for a,b,_ in rows) and [r[1] for r in rows] == sorted(r[1] for r in rows), 'in the order of their names'

@pytest.mark.parametrize('name', list(books))
def test_a_page_says_what_it_holds(name):
    title, about = llms.title(name)
    assert 3 < len(title) < 80 and 20 < len(about) < 300, (title, about)

def test_llms_txt():
    text = (nbs/'llms.txt').read_text(encoding='utf8')
    assert text == llms.llms(), 'run: python .ci/llms.py'
    for n in books: assert text.count(f']({site}/{page(n)})') == 1, n
    assert re.match(r'# [^\n]+\n\n> [^\n]+\n\n', text) and '\n## Optional\n' in text      # https://llmstxt.org
    config = (top/'_quarto.yml').read_text(encoding='utf8')
    shipped = re.search(r'resources:\n((?: +- .+\n)+)', config)[1]
    assert cfg['recursive'] == 'True', 'else nbdev hands no folder, and no picture, to Quarto'
    assert {'demo', 'images', 'llms.txt'} == set(re.findall(r'- (\S+)', shipped)) and (nbs/'styles.css').exists() and 'css: styles.css' in config

COLAB = f"""#| hide
import sys
if 'google.colab' in sys.modules:
    get_ipython().run_line_magic('pip', 'install -q git+{repo} hypothesis')"""
@pytest.mark.parametrize('name', numbered)
def test_colab(name):
    cells = [''.join(c['source']) for c in books[name]['cells']]
    install = [s for s in cells if 'google.colab' in s and ('pip' in s or s.startswith('#| hide'))]
    more = re.compile(r'''\n    get_ipython\(\).run_line_magic\('pip', ["']install -q (?!git)[^\n]+\)$''') # a page may want other packages
    plain = [more.sub('', s) for s in install]
    assert plain == [COLAB], f'{name}: the cell that installs the library on Colab should be\n{COLAB}\nand is\n{install}'
    badge = f'[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{cfg["user"]}/{cfg["repo"]}/blob/{cfg["branch"]}/nbs/{name})'
    assert [s.strip() for s in cells if 'colab-badge' in s] == [badge], f'{name}: {badge}'

def test_badges():
    first = markdown('index.ipynb').split('\n\n')
    badges = next(b for b in first if b.startswith('[![')).split('\n')
    flows = re.findall(rf'{re.escape(repo)}/actions/workflows/([\w.-]+)/badge\.svg', '\n'.join(badges))
    assert 'test.yml' in flows and all((top/'.github/workflows'/f).exists() for f in flows)
    tested = re.findall(r'"(3\.\d+)"', re.search(r'python: \[(.+)\]', (top/'.github/workflows/test.yml').read_text())[1])
    python = next(b for b in badges if 'badge/python' in b)
    assert re.findall(r'3\.\d+', python.split('](')[0]) == tested and tested[0] == cfg['min_python'], 'the Python versions are those of the workflow'
    assert re.findall(r'badge/python-([^-]+)-', python)[0].replace('%20%7C%20', ' ').split() == tested
    assert any('Apache' in b and f'{repo}/blob/{cfg["branch"]}/LICENSE' in b for b in badges) and 'Apache License' in (top/'LICENSE').read_text()[:300]
    assert any(f']({site})' in b for b in badges) and any('colab-badge' in b for b in badges)
    assert markdown('index.ipynb').split('\n\n')[2].startswith('[![') and (top/'README.md').read_text(encoding='utf8').split('\n\n')[2].startswith('[![')

# What 18_troubleshooting quotes. A placeholder of an f-string in the source, and … in a quotation, stand for anything.
HOLE = '\0'
def strings(): # of the library, with its f-strings
    for f in sorted((top/'resnet_bk').glob('*.py')):
        for n in ast.walk(ast.parse(f.read_text(encoding='utf8'))):
            if isinstance(n, ast.JoinedStr): yield ''.join(v.value if isinstance(v, ast.Constant) else HOLE for v in n.values)
            elif isinstance(n, ast.Constant) and isinstance(n.value, str): yield n.value
            elif isinstance(n, ast.BinOp) and isinstance(n.op, ast.Add): # 'a' + f'b'
                flat = lambda n: flat(n.left) + flat(n.right) if isinstance(n, ast.BinOp) else ''.join(v.value if isinstance(v, ast.Constant) else HOLE for v in n.values) if isinstance(n, ast.JoinedStr) else n.value if isinstance(n, ast.Constant) and isinstance(n.value, str) else HOLE
                yield flat(n)

def quoted(message, s): # whether the source's string s can make the message, or holds it
    plain = len(s.replace(HOLE, ''))
    if plain >= 8 and plain >= .45*len(message.replace('…', '')) and re.fullmatch('.*'.join(map(re.escape, s.split(HOLE))), message, re.S): return True
    parts = [p for p in re.split('…', message) if p.strip()]
    return all(len(p) >= 4 for p in parts) and bool(re.search('.*'.join(map(re.escape, parts)), s, re.S))

def tables(name): return [r for r in re.findall(r'^\| (.+) \|$', markdown(name), re.M) if not re.match(r'[-| ]+$', r)]
def messages(): # what stands in backticks in the first column under a heading "message ..."
    is_message, out = False, []
    for r in tables('18_troubleshooting.ipynb'):
        first = r.split(' | ')[0]
        if first in ('message', 'message or symptom', 'symptom', 'the validation loss is'): is_message = first.startswith('message')
        elif is_message: out += re.findall(r'`([^`]+)`', first)
    return out

FOREIGN = {'Killed': 'the shell', 'No space left on device': 'errno', 'Permission denied': 'errno'}
def test_quoted_messages_are_the_librarys():
    said, all_strings = messages(), list(strings())
    assert len(said) > 50
    stale = [m for m in said if m not in FOREIGN and not any(quoted(m, s) for s in all_strings)]
    assert not stale, f'18_troubleshooting quotes these, and nothing in the library says so: {stale}'

def test_a_stale_message_is_found():
    all_strings = list(strings())
    for m in ('there is no preset …; you have …', 'no compiler: install gcc or clang', 'fit needs exactly one of steps, epochs or minutes; got …'):
        assert not any(quoted(m, s) for s in all_strings), m

def test_options_that_are_recommended_exist():
    from resnet_bk.cli import OPTIONS, load_parts
    load_parts()
    text = markdown('18_troubleshooting.ipynb') + markdown('17_extend.ipynb') + markdown('index.ipynb')
    others = {'nproc-per-node', 'num_processes', 'version', 'install', 'prompt', 'dist', 'quick', 'help', 'use', 'n'}
    mine = re.findall(r'register_option\(\'(\w+)\'', (top/'tests/outside/bk_outside.py').read_text())
    for o in re.findall(r'(?<![\w-])--([a-z][\w-]*)', text): assert o in OPTIONS or o in others or o in mine, f'--{o}'
