"""ImageNet's pixel statistics, with which a pretrained vision backbone has learned to see."""

# Mean and standard deviation per channel (R, G, B) of pixels in [0, 1].
IMAGENET_STATISTICS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
