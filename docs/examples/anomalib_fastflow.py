"""anomalib's FastFlow, accelerated: trained on a folder of images, tested, exported to ONNX.

    python anomalib_fastflow.py [FOLDER] [--pretrained]

FOLDER holds good/, defect/ and mask/, the defects' masks. Without one, tiny images are drawn.
"""

import argparse
from pathlib import Path

import numpy as np
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Fastflow
from lightning.pytorch import seed_everything
from PIL import Image

from fastflow_kernels import accelerate, report

SIZE = (128, 128)


def draw_images(folder: Path) -> None:
    """Draw 16 images of noisy stripes, and 4 more with a dark square and its mask."""
    rng = np.random.default_rng(0)
    for name in ("good", "defect", "mask"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(20):
        image = 128 + 60 * np.sin(np.arange(SIZE[1]) / 4) + rng.normal(0, 10, SIZE)
        kind = "good" if number < 16 else "defect"
        if kind == "defect":
            row, column = rng.integers(16, 80, 2)
            square = np.s_[row : row + 32, column : column + 32]
            image[square] = 20
            mask = np.zeros(SIZE, np.uint8)
            mask[square] = 255
            Image.fromarray(mask).save(folder / "mask" / f"{number}.png")
        pixels = image.clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(folder / kind / f"{number}.png")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?", help="with good/, defect/ and mask/")
    parser.add_argument("--pretrained", action="store_true", help="download the backbone's weights")
    args = parser.parse_args()
    if args.folder is None:
        args.folder = Path("stripes")
        draw_images(args.folder)

    seed_everything(0)
    datamodule = Folder(
        name=args.folder.name,
        root=args.folder,
        normal_dir="good",
        abnormal_dir="defect",
        mask_dir="mask",
        train_batch_size=4,
        num_workers=0,  # worker processes do not pay off for a few small images
    )
    # Without --pretrained the backbone is random: enough to try the code, not for real images.
    model = Fastflow(
        backbone="resnet18",
        pre_trained=args.pretrained,
        pre_processor=Fastflow.configure_pre_processor(SIZE),
    )
    model = accelerate(model)
    print(str(report(model)).splitlines()[0])

    engine = Engine(max_epochs=2)
    engine.fit(model, datamodule=datamodule)
    (metrics,) = engine.test(model, datamodule=datamodule)
    print(f"image AUROC {metrics['image_AUROC']:.2f}, pixel AUROC {metrics['pixel_AUROC']:.2f}")

    # anomalib asks for opset 14 by default, and torch's exporter cannot convert down to it.
    opset = {"opset_version": 18}
    path = engine.export(model, export_type="onnx", input_size=SIZE, onnx_kwargs=opset)
    print(f"exported to {path}")


if __name__ == "__main__":
    main()
