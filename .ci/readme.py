"""README.md is nbs/index.ipynb as Markdown: text and examples as they are, and of the cells behind the tables
only what they printed. `python .ci/readme.py` writes it; a test compares."""
import json, re
from pathlib import Path

top = Path(__file__).resolve().parents[1]

def readme():
    parts = []
    for c in json.loads((top/'nbs'/'index.ipynb').read_text(encoding='utf8'))['cells']:
        src = ''.join(c['source'])
        if c['cell_type'] == 'markdown': parts.append(src)
        elif c['cell_type'] == 'code' and '#| echo: false' in src:
            said = [o.get('text', []) for o in c['outputs'] if o['output_type'] == 'stream']
            text = ''.join(''.join(t) for t in said).strip('\n')
            if text: parts.append(f'```\n{text}\n```')
        elif '#| hide' not in src: parts.append(f'```python\n{src}\n```')
    text = '\n\n'.join(parts) + '\n'
    return re.sub(r'\]\((images/|\d\d[a-z]?_\w+\.ipynb)', r'](nbs/\1', text)    # paths as seen from the top

if __name__ == '__main__': (top/'README.md').write_text(readme(), encoding='utf8')
