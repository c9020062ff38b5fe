# This script becomes the notebook docs/first_steps.ipynb: edit it, then run `python docs/notebook.py`.
# A cell begins at "# %%". Lines that begin with "# !" are for the shell.

# %% [markdown]
# # First steps: DETR, side by side
#
# This notebook installs the code, trains a small detector, shows its predictions, trains on your own images
# and resumes a run. It runs on Colab, on Kaggle and on any machine with Jupyter, with or without a GPU.
#
# * **Colab**: Runtime > Change runtime type > T4 GPU.
# * **Kaggle**: Settings > Accelerator > GPU T4 x2, and Settings > Internet on.
#
# ## 1. Install
#
# Write the address of the repository, as `git clone` needs it, between the quotation marks. Nothing needs a
# compiler. If your torch is too old, the last line installs a newer one. Then restart the session once and
# run the cell again.

# %%
import os

REPOSITORY = ""
if os.path.exists("../train.py"):  # this notebook was opened in docs/
    os.chdir("..")
if not os.path.exists("train.py"):
    # !git clone -q {REPOSITORY} detr_side_by_side
    os.chdir("detr_side_by_side")
# !pip install -q -r requirements.txt

# %% [markdown]
# ## 2. Train
#
# The next cell trains Deformable DETR on the embedded shapes. They are drawn during the training, so there
# is nothing to download. Two CPU cores need a few minutes, and the run prints an estimate before it starts.
# You can interrupt it at any time: section 6 shows how to resume it.
#
# **Settings for a T4.** You need none: `--device auto` is the default and uses the GPU.
#
# * `--amp` computes with short numbers: float16 on a T4, with a scaler that keeps small gradients from
#   becoming 0, and bfloat16 on newer GPUs. It is meant for large models (`--preset paper`). Nobody has
#   timed a T4, so compare the time of a hundred steps with and without it.
# * Colab has two CPU cores, and these prepare the images. More than `--workers 2` does not help.
# * Kaggle has two T4: `torchrun --nproc-per-node 2 train.py ...` uses both, and `--batch-size` stays the
#   total.
# * For large models, `--preset paper --batch-size 16 --accumulate 8 --amp` computes 16 images in 8 parts.
#   If memory does not suffice, the run stops before its first step; then use more parts. Learning rates are
#   for exactly this batch size.

# %%
# !python train.py --model deformable_detr

# %% [markdown]
# ## 3. Look
#
# The first picture shows losses and AP over the run, the second one held-out images: truth in green,
# predictions in red. `docs/numbers.md` explains every number.

# %%
from pathlib import Path

from IPython.display import Image, display


def newest(pattern):
    """The latest run; the folder of a second run with the same name ends in -2."""
    return max(Path("runs").glob(pattern), key=lambda path: path.stat().st_mtime)


RUN = newest("deformable_detr-shapes*")
display(Image(RUN / "curves.png"))
display(Image(RUN / "predictions.png"))

# %% [markdown]
# The figure of the method's paper shows where the queries of the decoder sample the image.

# %%
# !python visualize.py --weights {RUN} --attention --count 2
for picture in sorted(Path("pictures").glob("*-attention.png"))[:2]:
    display(Image(picture))

# %% [markdown]
# You can also predict from Python. The input is a path, a list, a folder, a PIL image, an array or a
# tensor, and the boxes are in its pixels.

# %%
from support import data
from support.predict import load

pixels, _, _ = data.load()["val"].draw(0)
for name, score, box in load(RUN).predict(pixels, threshold=0.3):
    print(f"{name:10} {score:.2f}", [round(x) for x in box])

# %% [markdown]
# ## 4. Your own images
#
# You need a folder with COCO, VOC or YOLO annotations, as published or as Roboflow exports them.
# `docs/options.md` shows the layouts. If your images are not divided into train and val, add `--split 0.2`.
# Upload the folder as a zip file (`!unzip -q my_photos.zip`), or mount your Drive on Colab:
#
#     from google.colab import drive
#     drive.mount("/content/drive")
#
# The next cell writes such a folder with drawn images, as an example. Skip this cell if you have your own
# images.

# %%
import json

from PIL import Image as Photo

FOLDER = Path("my_photos")
for split, count in ("train", 40), ("val", 10):
    shapes = data.load()[split]
    images, annotations = [], []
    (FOLDER / "annotations").mkdir(parents=True, exist_ok=True)
    (FOLDER / split).mkdir(exist_ok=True)
    for i in range(count):
        pixels, drawn, _ = shapes.draw(i)
        Photo.fromarray(pixels).save(FOLDER / split / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": drawn.width, "height": drawn.height})
        for label, (x1, y1, x2, y2) in zip(drawn.labels.tolist(), drawn.boxes_xyxy.tolist()):
            annotations.append({"id": len(annotations), "image_id": i, "category_id": label + 1,
                                "bbox": [x1, y1, x2 - x1, y2 - y1]})
    categories = [{"id": k, "name": name} for k, name in enumerate(shapes.class_names, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (FOLDER / f"annotations/instances_{split}.json").write_text(json.dumps(content))

# %% [markdown]
# Check the folder first. This command opens every image and lists all mistakes with their places. The
# number of classes is never a setting.

# %%
# !python -m support.check_data {FOLDER}

# %% [markdown]
# ## 5. Train on them
#
# If you have few images, start from trained weights: `--init` reads a run of ours or weights of the
# official repositories, and the classes may differ. If AP stays at 0, try `--overfit 2`: when AP comes
# close to 1, model and data are fine.

# %%
# !python train.py --model deformable_detr --data {FOLDER} --init {RUN} --steps 300
OWN = newest(f"deformable_detr-{FOLDER.name}*")
display(Image(OWN / "predictions.png"))

# %% [markdown]
# ## 6. Resume
#
# After an interruption, a crash or the end of a session, `--resume` continues a run exactly from its last
# checkpoint. Here it continues to a larger number of steps. Colab deletes its disk at the end of a session:
# train with `--out /content/drive/MyDrive/runs/mine` to keep a run in your Drive. On Kaggle, "Save version"
# keeps all files below /kaggle/working.

# %%
# !python train.py --resume {OWN} --steps 400

# %% [markdown]
# ## 7. Next steps
#
# * Read the files: `detr.py` from top to bottom, then `git diff --no-index detr.py conditional_detr.py`.
# * Your own models and exercises belong in the folder `work/`, which git ignores: `python train.py --model
#   work/mine.py` trains any file that keeps the contract in `docs/contract.md`.
# * `docs/options.md` has all settings, `docs/predict.md` predictions from Python, `docs/export.md` ONNX and
#   `docs/exercises.md` exercises.
