# The learning rate and its decay differ from variant to variant: each config names its own.
_base_ = './epochs_36.py'
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='float16',
    loss_scale='dynamic',
    optimizer=dict(type='AdamW', betas=(0.9, 0.999), weight_decay=0.05),
    # one learning rate a layer; the constructor takes weight decay from biases, norms and layer scales by itself
    constructor='replk_mm.LayerDecayOptimizerConstructor',
    paramwise_cfg=dict(decay_type='layer_wise', num_layers=12),
    clip_grad=None)
# lr belongs to this many images an iteration, all GPUs together
auto_scale_lr = dict(enable=True, base_batch_size=16)
