"""Vision-language-action models: observations in, action chunks and their log-probabilities out.

Knows networks, images and normalisation. Knows no robot, no adapter on disk and no learning.
Begin with `protocol`; then one family, `discrete` or `flow`.
"""
