"README.md is nbs/index.ipynb as Markdown: text as it stands, of the code only its printed output. `python .ci/readme.py` writes it; a test compares."
import json, re
from pathlib import Path

top = Path(__file__).resolve().parents[1]

def readme():
    parts = []
    for c in json.loads((top/'nbs'/'index.ipynb').read_text(encoding='utf8'))['cells']:
        src = ''.join(c['source'])
        if c['cell_type'] == 'markdown': parts.append(src)
        elif c['cell_type'] == 'code' and '#| echo: false' in src:
            text = ''.join(''.join(o.get('text', [])) for o in c['outputs'] if o['output_type'] == 'stream').strip('\n')
            if text: parts.append(f'```\n{text}\n```')
    text = '\n\n'.join(parts) + '\n'
    return re.sub(r'\]\((images/|\d\d_\w+\.ipynb)', r'](nbs/\1', text)    # paths as seen from the top

if __name__ == '__main__': (top/'README.md').write_text(readme(), encoding='utf8')
