"""What of the log is printed: announced lines and warnings that a user can act on. The log file has everything."""

import logging
import warnings

import numpy as np
import pytest
from mmengine.logging import MMLogger, print_log

from replk_mm.logs import Note, announce, limit_terminal, log_notes, log_python_warnings
from replk_mm.text import class_table, format_duration, format_metrics


def test_terminal_shows_less_than_the_file(tmp_path, capsys):
    limit_terminal(MMLogger.get_instance(str(tmp_path), log_file=str(tmp_path / 'x.log')))
    print_log('Config: ...', logger='current')
    print_log('an upstream default', logger='current', level=logging.WARNING)
    announce('downloading')
    log_notes(['warning: of a file', Note('warning: random weights', logging.WARNING), Note('resume: iter_2.pth')])
    with warnings.catch_warnings():
        log_python_warnings()
        warnings.warn_explicit('use another argument', UserWarning, '/lib/mmseg/models/builder.py', 1)
        warnings.warn_explicit('mine', UserWarning, '/home/me/transforms.py', 1)
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == ['downloading', 'warning: random weights', 'resume: iter_2.pth']
    assert len(shown) == 4 and 'mine' in shown[3]
    text = (tmp_path / 'x.log').read_text()
    assert all(
        words in text for words in ('Config', 'upstream', 'downloading', 'of a file', 'another argument', 'mine')
    )


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [
        (0.42, '0.42 s'),
        (24.4, '24 s'),
        (59.7, '1 min 0 s'),
        (200, '3 min 20 s'),
        (7500, '2 h 5 min'),
        (111600, '1 d 7 h'),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_metrics_in_a_line():
    found = {'mIoU': 61.2345, 'coco/bbox_mAP': 0.52234, 'coco/AR@100': 0.5, 'coco/cat_precision': 0.0001629}
    found |= {'lvis/bbox_AP': 1.0, 'nothing': float('nan'), 'bbox_mAP_l': -1, 'time': 1.0}
    shown = 'mIoU 61.23  coco/bbox_mAP 52.23  coco/AR@100 50.00  coco/cat_precision 0.02  lvis/bbox_AP 100.00'
    assert format_metrics(found) == shown
    assert format_metrics({'mIoU': np.float32(61.2345)}) == 'mIoU 61.23'  # mmseg's
    assert format_metrics(found, ['a', 'b']).endswith('100.00 (2 classes have no ground truth: a, b)')


def test_scores_of_classes_are_percent():
    detection = class_table({'dog': dict(bbox_mAP=0.52234, bbox_mAP_50=1.0, instances=3)}, ['cat']).splitlines()
    assert detection[2].split() == ['dog', '52.23', '100.00', '3']
    assert detection[3].split() == ['cat', '-', '-', 'no', 'objects']
    segmentation = class_table({'sky': dict(IoU=61.2345, pixels=5)}).splitlines()
    assert segmentation[-1].split() == ['sky', '61.23', '100.0', '%']


def test_log_shows_the_best_ap_in_percent(tmp_path):
    logger = limit_terminal(MMLogger.get_instance('percent', log_file=str(tmp_path / 'x.log')))
    logger.info('The best checkpoint with 0.5223 coco/bbox_mAP at 100 iter is saved to x.pth.')
    logger.info('The best checkpoint with 61.2345 mIoU at 100 iter is saved to x.pth.')
    logger.info('Iter(val) [3/3]    loss: 0.1234  coco/bbox_mAP: 1.0000  lvis/bbox_APr: 0.0500  data_time: 0.1')
    text = (tmp_path / 'x.log').read_text()
    assert 'with 52.23 coco/bbox_mAP at 100' in text and 'with 61.2345 mIoU' in text
    assert 'loss: 0.1234  coco/bbox_mAP: 100.00  lvis/bbox_APr: 5.00  data_time: 0.1' in text
