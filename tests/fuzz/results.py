"""Readers of records and results, hostile ones, and what is made of them."""
import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from fuzz.mutate import Build, Choices, changed_bytes, edited, text_of
from replk_mm.errors import UserError

NAMES = ('person', 'car', 'dog')
_OBEYED = '\x1b\x07\x00\x9b\u202e\ud800'


def _one_record() -> list[dict]:
    import numpy as np
    from report_records import complete, facts

    def plain(value: object) -> object:
        return float(value) if isinstance(value, np.floating) else value

    found = complete('row', 'A row', 0, 50.0, 1.0, dict(predictions='p', heat_map='h.png'))
    found[0]['facts'] = facts(Path('scenes'), images='images', labels='labels')
    boxes = facts(Path('scenes'), images='images', labels='', annotations='objects.json')
    found += [{**found[0], 'row': 'other', 'seed': 1, 'key': 'other.1'}, {**found[0], 'row': 'b', 'key': 'b', 'facts': boxes}]
    return json.loads(json.dumps(found, default=plain))


def _pictures(folder: Path) -> None:
    """A work dir with data and predictions of both tasks."""
    import numpy as np
    from PIL import Image

    for name in ('p/a.png', 'data/scenes/labels/a.png', 'data/scenes/images/a.jpg'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ones((64, 80, 3) if name.endswith('jpg') else (64, 80), np.uint8)).save(folder / name)
    (folder / 'h.png').write_bytes((folder / 'p/a.png').read_bytes())
    found = some_detections()[:1]
    (folder / 'p/instances.segm.json').write_bytes(text_of(found))
    (folder / 'data/scenes/objects.json').write_bytes(text_of(dict(
        images=[dict(id=1, file_name='a.jpg', height=64, width=80)], categories=[dict(id=5, name='disc')], annotations=found)))


def report(folder: Path, file: Path) -> Callable[[], object]:
    """Reads records and makes a page of them."""
    from replk_mm.bench.report import assemble, markdown, webpage

    _pictures(folder)
    lines = folder / 'results' / 'a.jsonl'
    lines.parent.mkdir(exist_ok=True)
    lines.unlink(missing_ok=True)
    lines.symlink_to(file)

    def one() -> None:
        found = assemble.read([folder])
        page, text = webpage.page(found), markdown.page(found)
        assert page.count('<script') == 1, 'a script of a record'
        assert not any(c in text for c in _OBEYED), 'characters that a terminal obeys'

    for record in _one_record():
        file.write_bytes(text_of(record))
        one()
    assert webpage.page(assemble.read([folder])).count('<img') == 3
    return one


def lines(folder: Path, file: Path) -> Callable[[], object]:
    """Reads records."""
    from replk_mm.bench import records

    def one() -> None:
        found, complaints = records.read([file])
        if complaints:
            raise UserError(complaints[0])
        records.by_suite(found)

    return one


def record_files() -> Build:
    """Spoiled records."""
    originals = _one_record()

    def build(choices: Choices) -> bytes:
        lines = [choices.pick(originals) for _ in range(1 + choices.below(3))]
        texts = [text_of(edited(line, choices)) if choices.below(4) else text_of(line) for line in lines]
        return changed_bytes(b'\n'.join(texts), choices) if choices.below(4) == 0 else b'\n'.join(texts)

    return build


def a_result() -> dict:
    """A metrics.json."""
    return dict(
        metrics=dict(mIoU=50.0, time=0.1),
        per_class={'sky': dict(IoU=40.0, Acc=50.0, pixels=90), 'cat': dict(IoU=60.0, pixels=9)},
        config='c.py',
        reparameterized=None,
        seconds=1.5,
        protocol=dict(mode='whole', pipeline=[dict(type='Resize', scale=[64, 64])]),
        checkpoint=dict(path='x.pth', sha256='0', iteration=4),
        data=dict(root='d', images=2),
        environment=dict(torch='2', threads=2),
    )


def results(folder: Path, file: Path) -> Callable[[], object]:
    """Reads a metrics.json and compares it with another."""
    from replk_mm.bench.compare import compare, text

    other = folder / 'other' / 'metrics.json'
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(text_of(a_result()))

    def one() -> None:
        found = compare(str(other), str(file), images=None)
        said = '\n'.join([*text.lines(found), *text.lines(found, markdown=True), json.dumps(found)])
        assert not any(c in said for c in _OBEYED), 'characters that a terminal obeys'

    file.write_bytes(text_of(a_result()))
    one()
    return one


def detections(folder: Path, file: Path) -> Callable[[], object]:
    """Reads detections and matches them with objects."""
    from coco_files import coco_dict

    from replk_mm.bench.compare import detection
    from replk_mm.bench.compare.results import Result

    data = coco_dict(NAMES)
    objects = detection.Objects(
        detection._index(data['images'], data['categories'], [{**a, 'iscrowd': 0} for a in data['annotations']]),
        {i['id']: i for i in data['images']},
        folder,
        {c['id']: c['name'] for c in data['categories']},
    )
    result = Result('A', folder / 'metrics.json', {})
    result.predictions.mkdir(exist_ok=True)
    for kind in ('bbox', 'segm'):
        (result.predictions / f'instances.{kind}.json').unlink(missing_ok=True)
        (result.predictions / f'instances.{kind}.json').symlink_to(file)

    def one() -> None:
        for kind in ('bbox', 'segm'):
            with contextlib.suppress(UserError) if kind == 'bbox' else contextlib.nullcontext():
                found = detection.open_detections(result, objects, kind, 0.0)
                detection.counts(detection.match(objects, found, list(objects.images), kind).values())

    file.write_bytes(text_of(some_detections()))
    one()
    return one


def some_detections() -> list[dict]:
    """Detections as COCO has them."""
    from pycocotools import mask

    outline = mask.frPyObjects([[4.0, 6, 20, 6, 20, 18, 4, 18]], 64, 80)[0]
    return [
        dict(
            image_id=i + 1,
            category_id=5 + 10 * i,
            score=0.9 - 0.1 * i,
            bbox=[4.0, 6, 16, 12],
            segmentation=dict(size=[64, 80], counts=outline['counts'].decode()),
        )
        for i in range(3)
    ]




def a_field() -> dict:
    """An erf.json."""
    from replk_mm.analysis import erf_result
    return dict(
        kind=erf_result.KIND, version=1, backbone='X', config='c.py', weights='random', trained=False, checkpoint=None,
        stage=3, channels=8, map_size=[2, 2], size=8, images=2, image_set='0' * 64, silent=0, preprocessing=dict(mean=[0.]),
        environment=dict(torch='2'), matrix='erf.npz', stride=4., offset=[0., 0.], values={}, protocol={})


def fields(folder: Path, file: Path) -> Callable[[], object]:
    """Reads an effective receptive field."""
    import numpy as np

    from replk_mm.analysis import erf_result

    np.savez_compressed(folder / 'erf.npz', scores=np.arange(64.).reshape(8, 8))

    def one() -> None:
        found = erf_result.Erf.load(file)
        json.dumps([found.values(), found.protocol(), found.notes(), found.stride, found.offset])

    file.write_bytes(text_of(a_field()))
    one()
    return one
