"""nbs/llms.txt says what the site holds, for a reader that is a program (https://llmstxt.org): the pages in the order
of the sidebar, each with its title and description. `python .ci/llms.py` writes it; a test compares."""
import json, re
from configparser import ConfigParser
from pathlib import Path

top = Path(__file__).resolve().parents[1]

def pages(): # (section, [notebook, ...]) of the sidebar; no YAML package: pip installs none with this one
    text = (top/'_quarto.yml').read_text(encoding='utf8').split('sidebar:')[1]
    found = [('Start', [])]
    for section, notebook in re.findall(r'- section: "([^"]+)"|- (\S+\.ipynb)', text):
        if section: found.append((section, []))
        else: found[-1][1].append(notebook)
    return found

def title(notebook): # and description
    nb = json.loads((top/'nbs'/notebook).read_text(encoding='utf8'))
    first = next(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')
    return re.match(r'# ([^\n]+)\n+> ([^\n]+)', first).groups()

def address(notebook): return re.sub(r'^\d+[a-z]*_', '', notebook).replace('.ipynb', '.html') # as nbdev names the page

def llms():
    cfg = ConfigParser(delimiters=['=']); cfg.read(top/'settings.ini', encoding='utf8'); cfg = cfg['DEFAULT']
    site, repo = cfg['doc_host'] + cfg['doc_baseurl'], cfg['git_url']
    out = [f"# {cfg['title']}", f"> {cfg['description']}",
           f"Install: `pip install git+{repo}`. Import from `{cfg['lib_name']}`. Commands: "
           + ', '.join(f"`{l.split('=')[0].strip()}`" for l in cfg['console_scripts'].splitlines()) + '. '
           'Each page is a notebook that ran as it is shown; the library is exported from them.']
    for section, notebooks in pages():
        lines = ['- [{}]({}): {}'.format(t, f'{site}/{address(n)}', d) for n in notebooks for t,d in [title(n)]]
        out.append(f'## {section}\n\n' + '\n'.join(lines))
    out.append(f'## Optional\n\n- [Changelog]({repo}/blob/main/CHANGELOG.md): what each version changed\n'
               f'- [Source]({repo}): notebooks in `nbs`, the exported library in `{cfg["lib_path"]}`, tests in `tests`')
    return '\n\n'.join(out) + '\n'

if __name__ == '__main__': (top/'nbs'/'llms.txt').write_text(llms(), encoding='utf8')
