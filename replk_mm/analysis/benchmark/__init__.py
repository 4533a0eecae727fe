"""Speed and memory of networks and of the depthwise convolution, beside the same in plain torch."""
