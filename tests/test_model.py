"Model and loop together: what neither notebook can test alone."
import pytest
from resnet_bk.data import LMData
from resnet_bk.learner import Learner
from resnet_bk.model import ModelConfig, ResNetBK

@pytest.fixture(scope='module')
def data():
    d = LMData.from_corpus('stdlib'); return LMData(d.tokenizer, d.train_tokens[:50_000], d.valid_tokens[:3000], d.floors, d.name, 8, 64)

def test_a_bidirectional_model_is_refused(data):
    with pytest.raises(ValueError, match='see the next one'): Learner(ResNetBK(ModelConfig(256, 16, 1, causal=False)), data, progress=False).fit(steps=1)
    Learner(ResNetBK(ModelConfig(256, 16, 1, causal=False, allow_leak=True)), data, progress=False).fit(steps=1)

def test_the_default_model_beats_the_unigram_floor_and_survives_a_round_trip(data, tmp_path):
    model = ResNetBK(ModelConfig(256, 32, 2)).init_unigram(data.train_tokens)
    learn = Learner(model, data, lr=1e-2, progress=False, eval_every=0).fit(steps=60)
    nats = learn.evaluate()['nats']; assert nats < data.floors.unigram - .2
    model.save_pretrained(tmp_path)
    assert abs(Learner(ResNetBK.from_pretrained(tmp_path), data, progress=False).evaluate()['nats'] - nats) < 1e-6
