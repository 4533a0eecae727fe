_base_ = './van_160k.py'
# pos_block is in no parameter of this network, but in the authors' files
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'head': dict(lr_mult=10.0), 'pos_block': dict(decay_mult=0.0)}))
