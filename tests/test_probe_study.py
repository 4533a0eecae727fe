"""scripts/probe_study.py: the report of finished steps, and that finished steps are not repeated."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats


@pytest.fixture
def study(monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')  # as the script does
    import probe_study

    return probe_study


def write(study, out, scores):
    lines = [dict(step='pretrain', network=name, seed=0, score=50 + i) for i, name in enumerate(scores)]
    for (name, values), seed in itertools.product(scores.items(), study.SEEDS):
        for step, score in zip(('probe', 'fine_tune'), values, strict=True):
            lines.append(dict(step=step, network=name, seed=seed, score=score + seed - 1))
    (out / 'results.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def test_the_report_ranks_networks_and_counts_the_points_that_a_pick_loses(study, tmp_path):
    (tmp_path / 'images').mkdir()
    page = tmp_path / 'page.md'
    page.write_text(f'before\n{study.BEGIN}old\n{study.END}after\n')
    scores = {'resnet-18': (30, 60), 'van-b0': (20, 64), 'mscan-t': (10, 40), 'unireplknet-a': (5, 20)}
    write(study, tmp_path, scores)
    with (tmp_path / 'results.jsonl').open('a') as file:  # unfinished networks are left out
        file.write(json.dumps(dict(step='pretrain', network='inceptionnext-atto', seed=0, score=99)) + '\n')
    study.report(tmp_path, page)
    text = page.read_text()
    assert text.startswith('before\n') and text.endswith('after\n') and 'old' not in text and 'inception' not in text
    order = [line.split(' | ')[0].strip('| ') for line in text.splitlines() if '(' in line and line.startswith('|')]
    assert order[:4] == ['van-b0', 'resnet-18', 'mscan-t', 'unireplknet-a']
    assert '| van-b0 | 51.0 | 20.0 (19.0, 20.0, 21.0) | 64.0 (63.0, 64.0, 65.0) |' in text
    of_probe = next(line for line in text.splitlines() if line.startswith('| linear probe |'))
    assert [cell.split(' [')[0] for cell in of_probe.strip('| ').split(' | ')[1:]] == ['0.80', '0.67', '4.00']
    assert '| 18.00 [' in text  # a random pick: 64 - (60 + 64 + 40 + 20) / 4
    assert '| accuracy of the pretraining | -0.80 [' in text
    page.write_text('# Page\n')
    study.report(tmp_path, page)
    assert page.read_text().startswith(f'# Page\n\n{study.SECTION}\n\n{study.BEGIN}| Network')
    assert (tmp_path / 'images' / 'probe_study.png').stat().st_size > 5000


def test_the_pick_and_its_judgement_are_of_other_scenes_and_of_the_same_pretraining(study, tmp_path, monkeypatch):
    starts, tested = [], []

    def prepare(cfg, options):
        starts.append(cfg.model.backbone.init_cfg.checkpoint)

    def evaluate(cfg, checkpoint, options):
        tested.append(set(cfg.test_dataloader.dataset.indices))
        return SimpleNamespace(metrics=dict(mIoU=1.0))

    functions = dict(prepare_probe=prepare, prepare_training=prepare, evaluate=evaluate, train=lambda *_, **__: 'x.pth')
    functions['probe'] = lambda *_: SimpleNamespace(config=study.CONFIG, checkpoint='x.pth')
    for name, function in functions.items():
        monkeypatch.setattr(study, name, function)
    assert study.linear_probe('van-b0', 0, tmp_path, 0) == study.fine_tune('van-b0', 0, tmp_path, 0) == 1.0
    assert starts == [str(tmp_path / 'pretrained/van-b0/backbone.pth')] * 2
    pick, judgement = tested
    assert pick and judgement and not pick & judgement and pick | judgement == set(range(study.VAL))


def test_finished_steps_are_not_repeated_and_none_begins_after_the_deadline(study, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(study, 'setup_process', lambda: None)
    for step in study.STEPS:
        monkeypatch.setitem(study.STEPS, step, lambda *args, step=step: called.append((step, *args[:2])) or 1.0)
    monkeypatch.setattr(study, 'write_demo_data', lambda *args, **kwargs: None)
    study.run(tmp_path, ['van-b0'], ['pretrain', 'probe'], 1)
    assert called == [('pretrain', 'van-b0', 0), *(('probe', 'van-b0', seed) for seed in study.SEEDS)]
    study.run(tmp_path, ['van-b0'], ['pretrain', 'probe'], 1)
    assert len(called) == 4
    with pytest.raises(study.OutOfTime):
        study.run(tmp_path, ['mscan-t'], ['pretrain'], -1)
    assert len(called) == 4


def test_rank_agreement_is_scipys_and_its_interval_the_paired_bootstrap(study):
    rng = np.random.default_rng(3)
    x = rng.normal(0, 1, 12).round(1)  # with ties
    y = (x + rng.normal(0, 0.7, 12)).round(1)
    found = study.rank_agreement(x[:, None], np.stack([y - 1, y + 1], 1))
    for part, function in (('spearman', stats.spearmanr), ('kendall', stats.kendalltau)):
        assert found[part][0] == pytest.approx(function(x, y)[0])
    again = study.rank_agreement(x[:, None], y[:, None])

    def statistic(a, b):
        return stats.spearmanr(a, b)[0]

    expected = stats.bootstrap((x, y), statistic, paired=True, method='percentile', n_resamples=1000, random_state=0)
    _, low, high = again['spearman']
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.05)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.03)
    assert found['spearman'][1] < low  # other seeds would differ too


def test_regret_is_what_the_pick_loses(study):
    found = study.rank_agreement([[1, 3], [2.5, 2.5], [0, 0]], [[40.0], [50], [30]])
    assert (found['regret'][0], found['random_regret'][0]) == (0, 10)
    found = study.rank_agreement([[3, 3], [2.5, 2.5], [0, 0]], [[40.0], [50], [30]])
    assert found['regret'] == (10, 0, 10)
    same = study.rank_agreement([[1.0]] * 3, [[1.0]] * 3)
    assert all(map(math.isnan, same['spearman'])) and same['regret'][2] == 0
