"""The models: two-branch classifiers on timm backbones, registered with timm."""
