"""What predict prints about the objects of an image."""

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from replk_mm.engine.predict import describe_instances, select_instances


@pytest.mark.parametrize(
    ('scores', 'fragment'),
    [
        ([0.9, 0.4, 0.3, 0.29], 'objects: 2 dog, 1 cat'),
        ([0.3], 'objects: 1 dog'),
        ([0.2994, 0.1], 'the highest score is 0.2994'),
        ([0.00016], 'the highest score is 0.00016'),
        ([], 'the model predicts none'),
    ],
)
def test_objects_or_the_highest_score(scores, fragment):
    count = len(scores)
    things = dict(bboxes=torch.zeros(count, 4), scores=torch.tensor(scores), labels=torch.arange(count) % 2)
    prediction = DetDataSample(pred_instances=InstanceData(**things))
    objects = select_instances(prediction, 0.3)
    assert describe_instances(prediction, objects, ['dog', 'cat']).endswith(fragment)
    assert len(objects) == sum(score >= 0.3 for score in scores)
