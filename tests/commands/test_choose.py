"""The command ``choose``, with rows that are recorded instead of run."""

import shlex
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from report_records import counted, record, speed
from tool_cases import tool_main

from replk_mm.analysis.statistics import Plan
from replk_mm.bench import choose
from replk_mm.bench.records import append_record
from replk_mm.bench.schema import read_suite
from replk_mm.commands import choose as command
from replk_mm.data.scenes.writer import write_demo_data

QUALITIES = {'moganet-xtiny.in1k': 0.7, 'moganet-tiny.in1k': 0.7, 'resnet-50': 0.7}


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('data') / 'scenes'
    write_demo_data(folder, train=4, val=2, size=(64, 64))
    return folder


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Rows get scores and times instead of being run; returns the function that sets the scores."""
    qualities, ran = dict(QUALITIES), []

    class Runner:
        def __init__(self, settings, environment) -> None:
            pass

        def run(self, tasks):
            for task in tasks:
                ran.append((task.row.name, task.seed, task.measures))
                base = task.row.name.removesuffix('-finetuned')
                common = dict(suite='choose', label=task.row.label, key=task.keys['metric'], asked=list(task.keys))
                protocol = dict(protocol=task.row.protocol, pretraining='ImageNet-1K')
                score = counted(task.work_dir, task.row.name, task.seed, qualities[base], 20, protocol=protocol)
                rates = [dict(learning_rate=rate, value=rate) for rate in task.row.learning_rates or ()]
                found = [score, record(task.row.name, task.seed, 'train', {}, facts=dict(learning_rates=rates))]
                if 'speed' in task.measures:
                    found.append(speed(task.row.name, task.seed, 10.0))
                    found += [record(task.row.name, task.seed, name, {}) for name in ('complexity', 'memory')]
                for one in found:
                    append_record({**one, **common, 'key': task.keys[one['measurement']]}, task.results)
            return []

    rows = [
        dict(name='moganet-xtiny.in1k', label='MogaNet-XT', backbone='moganet-xtiny.in1k'),
        dict(name='moganet-tiny.in1k', label='MogaNet-T', backbone='moganet-tiny.in1k'),
        dict(name='resnet-50', label='ResNet-50', backbone='mmseg.ResNet(depth=50)', pretrained=str(tmp_path)),
    ]
    monkeypatch.setattr(command, 'SuiteRunner', Runner)
    monkeypatch.setattr(
        choose, 'find_weights', lambda names, licence, scratch: (rows, {'swin-tiny': 'URL\n    as FILE'})
    )
    monkeypatch.setattr(choose, 'time_row', lambda row, data, device: (0.01, 3_000_000, 1.0))
    monkeypatch.setattr(command.psutil, 'Process', lambda: SimpleNamespace(create_time=lambda: time.time() - 1))
    monkeypatch.setattr('replk_mm.bench.suites.plan.build_on_meta', lambda cfg: None)
    # what takes long has tests of its own
    monkeypatch.setattr('replk_mm.bench.answer.plan', lambda scores, points: Plan(seeds=5, images=9, detectable=1.0))
    monkeypatch.setattr(command, 'render_html', lambda report, roots, limits: 'page')
    monkeypatch.chdir(tmp_path)
    return qualities, ran


def run(data: Path, *more: str, monkeypatch) -> int:
    monkeypatch.setattr(sys, 'argv', ['choose'])
    return tool_main('choose', '--data-root', data, '--device', 'cpu', *more, monkeypatch=monkeypatch)


@pytest.mark.slow
def test_a_planted_winner_is_named_with_its_training(data, pretend, monkeypatch, capsys) -> None:
    qualities, ran = pretend
    qualities['resnet-50'] = 0.9
    assert run(data, '--budget', '3min', monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    assert '\nTake ResNet-50' in text and 'swin-tiny: URL\n    as FILE' in text
    assert Path('work_dirs/choose/scenes/report/index.html').is_file()
    # costs are of the network, not of a training
    assert {(name, seed) for name, seed, measures in ran if 'speed' in measures} == {(name, 0) for name in QUALITIES}
    assert [seed for _, seed, _ in ran[:9]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    line = next(line for line in text.splitlines() if line.startswith('train it in full: '))
    words = shlex.split(line)
    assert (
        'mmseg.ResNet(depth=50)' in words
        and str(data.resolve()) in words
        and 'optim_wrapper.optimizer.lr=0.0002' in words
    )


@pytest.mark.slow
def test_the_rest_of_a_larger_budget_fine_tunes_the_best(data, pretend, monkeypatch, capsys) -> None:
    qualities, ran = pretend
    qualities['moganet-tiny.in1k'] = 0.2
    assert run(data, '--budget', '3min', monkeypatch=monkeypatch) == 0
    assert 'to add it: --resume --budget ' in capsys.readouterr().out
    suite = Path('work_dirs/choose/scenes/suite.yaml')
    assert len(read_suite(suite).rows) == 3
    with_error = run(data, '--budget', '2h', monkeypatch=monkeypatch)
    assert with_error == 2 and '--resume' in capsys.readouterr().err
    assert run(data, '--budget', '2h', '--resume', monkeypatch=monkeypatch) == 0
    tuned = {row.name: row for row in read_suite(suite).rows[3:]}
    assert set(tuned) == {'moganet-xtiny.in1k-finetuned', 'resnet-50-finetuned'}
    assert tuned['resnet-50-finetuned'].pretrained and tuned['resnet-50-finetuned'].iterations > 100
    assert 'cannot be distinguished' in capsys.readouterr().out  # planted ties
    done = len(ran)
    content = yaml.safe_load(suite.read_text())
    content['defaults']['seeds'] = [0, 1, 2, 3]  # as the answer advises
    suite.write_text(yaml.safe_dump(content))
    assert run(data, '--resume', monkeypatch=monkeypatch) == 0
    assert {seed for _, seed, _ in ran[done:]} == {3}
    assert run(data, '--resume', '--licence', 'permissive', monkeypatch=monkeypatch) == 0
    assert 'stay as they are: --licence ignored' in capsys.readouterr().out
    other = shutil.copytree(data, data.parent / 'other')
    assert run(other, '--resume', '--work-dir', str(suite.parent), monkeypatch=monkeypatch) == 2
    assert str(data.resolve()) in capsys.readouterr().err


@pytest.mark.slow
def test_limits_restrict_the_answer(data, pretend, monkeypatch, capsys) -> None:
    assert run(data, '--max-latency', '5', monkeypatch=monkeypatch) == 2
    assert 'within the limits' in capsys.readouterr().err
    assert run(data, '--max-latency', '8', monkeypatch=monkeypatch) == 0  # the first look is not precise
    assert '\nNo row is within your limits.' in capsys.readouterr().out


@pytest.mark.slow
def test_without_weights_published_results_answer(data, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(choose, 'find_weights', lambda names, licence, scratch: ([], {'swin-tiny': 'URL'}))
    monkeypatch.setattr(choose, 'list_backbones', lambda: ['moganet-xtiny', 'moganet-tiny', 'van-b0'])
    monkeypatch.chdir(tmp_path)
    assert run(data, monkeypatch=monkeypatch) == 0
    text, page = capsys.readouterr().out, Path('work_dirs/choose/scenes/report/index.html').read_text()
    assert 'swin-tiny: URL' in text
    for where in (text, page):
        assert 'Prior evidence on other data' in where and 'MogaNet-T (43.7, ' in where
    assert 'VAN-B0' not in text  # multi-scale only: another metric


@pytest.mark.parametrize('text', ['2', '2 h', '-2h', 'h'])
def test_a_budget_has_a_unit(text, data, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as info:
        run(data, f'--budget={text}', monkeypatch=monkeypatch)
    assert info.value.code == 2 and '10min' in capsys.readouterr().err
