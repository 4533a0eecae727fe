"""Readers of annotation files and images, and hostile ones."""
import contextlib
import functools
import io
import zlib
from collections.abc import Callable
from pathlib import Path

from fuzz.mutate import Build, Choices, changed_bytes, changed_json, text_of
from fuzz.results import NAMES, some_detections
from replk_mm.errors import UserError


def annotations(folder: Path, file: Path) -> Callable[[], object]:
    """Checks an annotation file; what is accepted is loaded as mmdet does and scored as pycocotools does."""
    from coco_files import coco_dict, write_images

    from replk_mm.data import coco, coco_checks
    from replk_mm.data.transforms import CheckedLoad

    images = folder / 'images'
    write_images(images)
    load = CheckedLoad(dict(type='mmdet.LoadAnnotations', with_bbox=True, with_mask=True))
    train = coco_checks.Use(train=True, masks=True, keep_empty=False)
    score = coco_checks.Use(train=False, masks=True)

    def one() -> None:
        coco.forget()
        with contextlib.suppress(UserError):
            coco_checks.check(file, images, train)
            _train_with(coco.read(file), load, images)
        coco_checks.check(file, images, score)
        _score_with(coco.read(file))

    file.write_bytes(text_of(coco_dict(NAMES)))
    one()
    return one


def _train_with(data: dict, load: Callable[[dict], object], images: Path) -> None:
    """What mmdet does with the annotations that were accepted."""
    for image in data['images']:
        instances = [
            dict(
                bbox=[a['bbox'][0], a['bbox'][1], a['bbox'][0] + a['bbox'][2], a['bbox'][1] + a['bbox'][3]],
                bbox_label=0,
                ignore_flag=0,
                mask=a['segmentation'],
            )
            for a in data['annotations']
            if a['image_id'] == image['id']
        ]
        with contextlib.suppress(UserError):
            load(
                dict(
                    img=None,
                    img_path=str(images / image['file_name']),
                    img_id=image['id'],
                    instances=instances,
                    ori_shape=(64, 80),
                    img_shape=(64, 80),
                    height=64,
                    width=80,
                )
            )


def _score_with(data: dict) -> None:
    """What pycocotools does with them."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = data
        api.createIndex()
        found = [
            dict(image_id=a['image_id'], category_id=a['category_id'], score=0.5, bbox=a['bbox']) for a in data['annotations']
        ]
        for a in data['annotations']:
            api.annToRLE(a)
        if found:
            evaluation = COCOeval(api, api.loadRes(found), 'bbox')
            evaluation.evaluate()


def annotation_files() -> Build:
    """Spoiled annotation files."""
    from coco_files import coco_dict

    plain, masks = coco_dict(NAMES, 2, 2), coco_dict(NAMES, 2, 2)
    good = some_detections()[0]['segmentation']['counts']
    for a, counts in zip(masks['annotations'], (good, [100, 20, 5000], good, [5120]), strict=True):
        a['segmentation'] = dict(size=[64, 80], counts=counts)
    return changed_json([plain, masks])


def images(folder: Path, file: Path) -> Callable[[], object]:
    """Looks at an image, and loads it as image and as label map."""
    from replk_mm.data.pairs import Rules, Task, inspect
    from replk_mm.data.problems import refuse
    from replk_mm.data.transforms import CheckedLoad

    load = CheckedLoad(dict(type='LoadImageFromFile'))
    labels = CheckedLoad(dict(type='mmseg.LoadAnnotations'), num_classes=9)
    task, rules = Task(str(file), str(file)), Rules(num_classes=9, decode=True, hashes=True)

    def one() -> None:
        with contextlib.suppress(UserError):
            refuse(inspect(task, rules).problems)
        with contextlib.suppress(UserError):
            labels(dict(img=None, seg_map_path=str(file), reduce_zero_label=False, seg_fields=[], label_map=None))
        load(dict(img_path=str(file)))

    for _, data in sorted(_some_images().items()):
        file.write_bytes(data)
        with contextlib.suppress(UserError):
            one()
        file.write_bytes(data[:-9])
        with contextlib.suppress(UserError):
            one()
    return one


@functools.cache
def _some_images() -> dict[str, bytes]:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 9, (20, 24, 3), np.uint8)
    found = {}
    for form, mode in (
        ('PNG', 'RGB'),
        ('PNG', 'L'),
        ('PNG', 'P'),
        ('PNG', 'I;16'),
        ('JPEG', 'RGB'),
        ('JPEG', 'L'),
        ('JPEG', 'CMYK'),
        ('BMP', 'RGB'),
        ('TIFF', 'RGB'),
        ('GIF', 'P'),
        ('WEBP', 'RGB'),
        ('PPM', 'RGB'),
    ):
        out = io.BytesIO()
        image = Image.fromarray(pixels[..., 0].astype(np.uint16)) if mode == 'I;16' else Image.fromarray(pixels).convert(mode)
        image.save(out, form)
        found[f'{form} {mode}'] = out.getvalue()
    return found


def image_files() -> Build:
    """Spoiled images."""
    originals = list(_some_images().values())

    def build(choices: Choices) -> bytes:
        data = choices.pick(originals)
        if data.startswith(b'\x89PNG') and choices.below(2):
            return _with_chunks(data, choices)
        if choices.below(4) == 0:  # sizes stand near the beginning
            at = choices.below(40)
            return data[:at] + choices.below(2**32).to_bytes(4, 'big') + data[at + 4 :]
        return changed_bytes(data, choices)

    return build


def _with_chunks(data: bytes, choices: Choices) -> bytes:
    """A PNG whose parts are changed and whose sums are right."""
    parts, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], 'big')
        parts.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += size + 12
    for _ in range(1 + choices.below(2)):
        which = choices.below(len(parts))
        name, content = parts[which]
        what = choices.below(5)
        if what == 0:
            parts[which] = name, changed_bytes(content, choices)
        elif what == 1:
            width, height = choices.pick((0, 1, 24, 400, 2**20, 2**31 - 1)), choices.pick((0, 1, 20, 400, 2**14, 2**31 - 1))
            parts[0] = b'IHDR', width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + parts[0][1][8:]
        elif what == 2:
            parts.insert(which, parts[which])
        elif what == 3:
            parts.insert(
                1,
                (
                    choices.pick((b'iCCP', b'zTXt', b'iTXt', b'PLTE', b'tRNS', b'acTL', b'eXIf', b'gAMA')),
                    b'x\0\0' + zlib.compress(b'\0' * choices.below(2**17)),
                ),
            )
        else:
            parts[which] = b'IDAT', zlib.compress(bytes(choices.below(2**17)))
    return data[:8] + b''.join(
        len(content).to_bytes(4, 'big') + name + content + zlib.crc32(name + content).to_bytes(4, 'big')
        for name, content in parts
    )


