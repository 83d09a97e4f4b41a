"""Golden image preparation: TensorFlow's JPEG, Lanczos-3 and crop as OpenVLA-OFT's evaluation code calls them.

Needs tensorflow-cpu and safetensors. Writes tests/golden/images/tensorflow.safetensors: per case the camera image, what
is left after JPEG and resampling to 56 x 56, and after the crop of 0.9 of the area.
"""

import os
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf
from safetensors.numpy import save_file

SIZE = 56
CASES = {"square": (64, 64), "wide": (48, 80), "small": (40, 40)}
OUT = Path(__file__).resolve().parents[1] / "images" / "tensorflow.safetensors"


def resized(image: np.ndarray) -> np.ndarray:
    x = tf.io.decode_image(tf.image.encode_jpeg(image), expand_animations=False, dtype=tf.uint8)
    x = tf.image.resize(x, (SIZE, SIZE), method="lanczos3", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(x), 0, 255), tf.uint8).numpy()


def cropped(image: np.ndarray, share: float = 0.9) -> np.ndarray:
    x = tf.image.convert_image_dtype(tf.convert_to_tensor(image), tf.float32)[None]
    side = tf.clip_by_value(tf.sqrt(share), 0, 1)
    low = (1 - side) / 2
    box = tf.reshape(tf.stack([low, low, low + side, low + side]), (1, 4))
    x = tf.image.crop_and_resize(x, box, [0], (SIZE, SIZE))[0]
    return tf.image.convert_image_dtype(tf.clip_by_value(x, 0, 1), tf.uint8, saturate=True).numpy()


def main() -> None:
    generator = np.random.default_rng(0)
    out = {}
    for name, (height, width) in CASES.items():
        y, x = np.mgrid[0:height, 0:width]
        waves = (127 + 120 * np.sin(x / 7 + y / 11), 255 * y / height, 127 + 100 * np.cos(x * y / 300))
        image = np.stack(waves, -1) + generator.normal(0, 6, (height, width, 3))
        image = np.clip(image, 0, 255).astype(np.uint8)
        out[f"{name}.camera"] = image
        out[f"{name}.resized"] = resized(image)
        out[f"{name}.cropped"] = cropped(out[f"{name}.resized"])
    OUT.parent.mkdir(exist_ok=True)
    save_file(out, OUT)


if __name__ == "__main__":
    main()
