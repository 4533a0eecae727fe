model = dict(a=1)
test_dataloader = dict()
default_scope = 'mmseg'
