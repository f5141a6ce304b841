"Text, tokenisers, caches and batches under what users do: other encodings, cut characters, several processes, damage."
import gzip, json, os, subprocess, sys, warnings
from pathlib import Path
import numpy as np, pytest
from resnet_bk.data import Corpus, load_corpus

TEXT = 'the cat sat on the mat\n'*900
NOT_TEXT = {'gz.txt': gzip.compress(TEXT.encode()), 'utf16.txt': TEXT.encode('utf-16'), 'nobom.txt': TEXT.encode('utf-16-le'), 'russian.txt': ('кот сидел на ковре\n'*99).encode('utf-16-be'),
            'zeros.bin': b'\0'*999, 'noise.bin': np.random.default_rng(1).bytes(5000)}

@pytest.mark.parametrize('name', NOT_TEXT)
def test_what_is_not_text_is_refused_however_it_is_given(name, tmp_path):
    good, bad = tmp_path/'good.txt', tmp_path/'folder'/name
    bad.parent.mkdir()
    good.write_text(TEXT)
    bad.write_bytes(NOT_TEXT[name])
    for given in (bad, str(bad), bad.parent, [bad], [good, bad], [good, bad.parent]):
        with pytest.raises(ValueError, match=name + ' is (compressed|UTF-16|binary)'): load_corpus(given)

def test_a_folder_leaves_other_files_out_and_says_so(tmp_path):
    (tmp_path/'a.txt').write_text(TEXT)
    for name,raw in NOT_TEXT.items(): (tmp_path/name).write_bytes(raw)
    with pytest.warns(UserWarning, match='6 of 7 files skipped'): c = load_corpus(tmp_path)
    assert c.train + c.valid == TEXT.encode()

@pytest.mark.parametrize('text', ['naïve café ψ\n', '中文\n', 'tab\tand\x0cfeed\x1b[0m\r\n'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'latin-1', 'gb18030'])
def test_text_is_taken_byte_for_byte(text, encoding, tmp_path):
    raw = (text*50).encode(encoding, 'replace')
    (tmp_path/'t.txt').write_bytes(raw)
    c = load_corpus(tmp_path/'t.txt')
    assert c.train + c.valid == raw

def test_no_name_is_no_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('t.txt').write_text(TEXT)
    for nothing in ('', '  ', None, [], 3):
        with pytest.raises(ValueError, match='no corpus'): load_corpus(nothing)
    for missing in (['t.txt', ''], ['no.txt'], 'no.txt'):
        with pytest.raises(FileNotFoundError, match='no file or folder'): load_corpus(missing)
    Path('empty.txt').touch()
    for empty in ('empty.txt', ['t.txt', 'empty.txt']):
        with pytest.raises(ValueError, match='empty.txt is empty'): load_corpus(empty)
