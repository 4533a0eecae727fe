"""Test-time augmentation of segmentors without the large logits of all views."""
import torch
from mmengine.structures import PixelData
from mmseg.models import SegTTAModel as MMSegSegTTAModel
from mmseg.structures import SegDataSample
from torch import Tensor

from replk_mm.models.segmentation import EncoderDecoder
from replk_mm.ops.class_map import class_map
from replk_mm.registry import MODELS


@MODELS.register_module()
class SegTTAModel(MMSegSegTTAModel):
    """mmseg's ``SegTTAModel``, which merges the views some rows at a time: the argmax of the mean of their probabilities.

    mmseg keeps the logits of all views at the photograph's size. Here all views of ``replk_mm.EncoderDecoder`` are brought to
    the same rows of the photograph and these are merged, so that what is kept are the views' small logits or, of sliding
    windows, the images and the windows over these rows. Other segmentors' views are added up in one map of probabilities.

    The samples are those of the first view, with ``pred_sem_seg``. Of one output channel, mmseg takes the sigmoid twice,
    after which no probability is below one half; here it is the mean of the views' probabilities that is compared with the
    head's threshold.

    Args:
        module: Segmentor or its config.
        data_preprocessor: As for mmseg's class.
    """

    def test_step(self, data: dict) -> list[SegDataSample]:
        """Predict images from their views.

        Args:
            data: ``inputs`` and ``data_samples``, each a list of views of lists of images.
        """
        views = [{key: value[i] for key, value in data.items()} for i in range(len(data['inputs']))]
        if isinstance(self.module, EncoderDecoder) and self.module.in_bands:
            logits = [list(self.module.logits_of(**self.module.data_preprocessor(view, False))) for view in views]
            found = [class_map([view.rows for view in image]).unsqueeze(0) for image in zip(*logits, strict=True)]
        else:
            found = self._labels_of_sums(views)
        for sample, labels in zip(views[0]['data_samples'], found, strict=True):
            sample.set_data(dict(pred_sem_seg=PixelData(data=labels)))
        return views[0]['data_samples']

    @torch.no_grad()
    def _labels_of_sums(self, views: list[dict]) -> list[Tensor]:
        """Labels ``(1, H, W)`` of each image, one view of all images at a time."""
        binary = self.module.out_channels == 1
        sums: list[Tensor] = []
        for view in views:
            for i, sample in enumerate(self.module.test_step(view)):
                found = sample.seg_logits.data
                share = found if binary else found.softmax(0)  # of one channel, mmseg's segmentors give the probability
                if i == len(sums):
                    sums.append(share.clone())
                else:
                    sums[i] += share
        if binary:
            return [(x / len(views) > self.module.decode_head.threshold).to(x) for x in sums]
        return [x.argmax(0, keepdim=True) for x in sums]
