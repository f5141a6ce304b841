"Runs the code cells of notebooks, those marked `#| cuda` too, and prints what these print. Needs no Jupyter and no nbdev."
import argparse, json, linecache, os, re, sys, time, traceback
from pathlib import Path

def code_cells(path, skip):
    for c in json.loads(path.read_text(encoding='utf8'))['cells']:
        s = ''.join(c['source'])
        flags = {f.split()[0].rstrip(':') for f in re.findall(r'^#\|\s*(\S.*)', s, re.M)}
        if c['cell_type'] != 'code' or flags & skip or re.search(r'^#\|\s*eval:\s*false', s, re.M): continue
        yield c['id'], 'cuda' in flags, re.sub(r'^(\s*)[%!].*', r'\1pass', s, flags=re.M)

def run(path, skip, names): # the cells that failed, and how many marked cuda did not; another cell that fails is the last
    failed, good = [], 0
    for id, cuda, s in code_cells(path, skip):
        name, t = f'{path.stem}[{id}]', time.perf_counter()
        linecache.cache[name] = len(s), None, s.splitlines(True), name      # for tracebacks and inspect
        if cuda: print(f'=== {name}', flush=True)
        try: exec(compile(s, name, 'exec'), names)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failed.append(name)
            if not cuda: break
        else: good += cuda
        if cuda: print(f'=== {time.perf_counter() - t:.1f} s', flush=True)
    return failed, good

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('notebook', type=Path)
    p.add_argument('--skip', default='notest slow', help='flags of cells that are left out')
    a = p.parse_args()
    path, names = a.notebook.resolve(), sys.modules['__main__'].__dict__
    os.chdir(path.parent)
    t = time.perf_counter()
    failed, good = run(path, set(a.skip.split()), names)
    print(f'{path.stem}: {"FAILED in " + ", ".join(failed) if failed else "all cells ran"}, of those marked cuda {good}, {time.perf_counter() - t:.0f} s')
    return len(failed)

if __name__ == '__main__': sys.exit(main())
