# The notebook docs/first_steps.ipynb as a plain script: edit this one, then run `python docs/notebook.py`.
# A cell begins at "# %%"; lines that begin with "# !" are for the shell.

# %% [markdown]
# # First steps: DETR, side by side
#
# Install, train for five minutes, look at the result, train on your own images, go on later. It runs on
# Colab, on Kaggle and on any machine with Jupyter, with a GPU or without one.
#
# * **Colab**: Runtime > Change runtime type > T4 GPU.
# * **Kaggle**: Settings > Accelerator > GPU T4 x2, and Settings > Internet on.
#
# ## 1. Install
#
# Put the address that `git clone` takes between the quotation marks. Nothing needs a compiler. If torch is
# older than this code needs, the second line brings a newer one; then restart the session once and run the
# cell again.

# %%
import os

REPOSITORY = ""
if os.path.exists("../train.py"):  # opened where it lies, in docs/
    os.chdir("..")
if not os.path.exists("train.py"):
    # !git clone -q {REPOSITORY} detr_side_by_side
    os.chdir("detr_side_by_side")
# !pip install -q -r requirements.txt

# %% [markdown]
# ## 2. Train for five minutes
#
# Deformable DETR on the embedded shapes, which are drawn when they are asked for: there is nothing to
# download. On two CPU cores it takes about five minutes; the README has the AP that it reaches.
# Interrupting is safe: section 6 goes on exactly there.
#
# **Settings for a T4.** None is needed: `--device auto` is the default and takes the GPU.
#
# * `--amp` computes in a short number format. A T4 has no bfloat16 in hardware, so `--amp` picks float16
#   there, with a scaler that keeps small gradients from becoming 0; on newer GPUs it picks bfloat16. It is
#   meant for large models (`--preset paper`); the small one here spends its time elsewhere. Nobody has
#   timed a T4: compare the time of a hundred steps with and without it.
# * Colab has two CPU cores, and they prepare the images: more than `--workers 2` does not help.
# * Kaggle has two T4: `torchrun --nproc-per-node 2 train.py ...` uses both, and `--batch-size` stays the
#   total.
# * Large models: `--preset paper --batch-size 16 --accumulate 8 --amp` computes 16 images in 8 parts. If
#   memory does not do, a run says so before its first step: take more parts. Learning rates are for exactly
#   this batch size.

# %%
# !python train.py --model deformable_detr

# %% [markdown]
# ## 3. Look
#
# Losses and AP over the run, then held-out images: truth in green, predictions in red. `docs/numbers.md`
# explains every number.

# %%
from pathlib import Path

from IPython.display import Image, display


def newest(pattern):
    """The run that was written last; a second run of one name gets a folder with -2."""
    return max(Path("runs").glob(pattern), key=lambda path: path.stat().st_mtime)


RUN = newest("deformable_detr-shapes*")
display(Image(RUN / "curves.png"))
display(Image(RUN / "predictions.png"))

# %% [markdown]
# What the method's paper shows: where the queries of the decoder sample the image.

# %%
# !python visualize.py --weights {RUN} --attention --count 2
for picture in sorted(Path("pictures").glob("*-attention.png"))[:2]:
    display(Image(picture))

# %% [markdown]
# And from Python: a path, a list, a folder, a PIL image, an array or a tensor goes in, boxes in its pixels
# come out.

# %%
from support import data
from support.predict import load

pixels, _, _ = data.load()["val"].draw(0)
for name, score, box in load(RUN).predict(pixels, threshold=0.3):
    print(f"{name:10} {score:.2f}", [round(x) for x in box])

# %% [markdown]
# ## 4. Your own images
#
# A folder with COCO, VOC or YOLO annotations, as published or as Roboflow exports them; `docs/options.md`
# shows the layouts. Images that are not divided into train and val get `--split 0.2`. Upload the folder as
# a zip file (`!unzip -q my_photos.zip`), or on Colab mount your Drive:
#
#     from google.colab import drive
#     drive.mount("/content/drive")
#
# The next cell writes such a folder, with drawn images, to have something to show. Leave it out if you have
# your own.

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
# Check it first: every image is opened, and what is wrong is said with its place. The number of classes is
# never a setting.

# %%
# !python -m support.check_data {FOLDER}

# %% [markdown]
# ## 5. Train on them
#
# Few images? Start from trained weights. `--init` takes a run of ours or weights of the official
# repositories; other classes are fine. If AP stays at 0, try `--overfit 2` first: when AP comes close to 1,
# model and data are fine.

# %%
# !python train.py --model deformable_detr --data {FOLDER} --init {RUN} --steps 300
OWN = newest(f"deformable_detr-{FOLDER.name}*")
display(Image(OWN / "predictions.png"))

# %% [markdown]
# ## 6. Go on
#
# After an interruption, a crash or the end of a session a run goes on exactly where it was last saved, here
# to a larger number of steps. What a session leaves on Colab's disk is gone with it: train with `--out
# /content/drive/MyDrive/runs/mine` to keep a run in your Drive. On Kaggle "Save version" keeps what is
# below /kaggle/working.

# %%
# !python train.py --resume {OWN} --steps 400

# %% [markdown]
# ## 7. Where next
#
# * The files themselves: `detr.py` from top to bottom, then `git diff --no-index detr.py
#   conditional_detr.py`.
# * `docs/options.md` for all settings, `docs/export.md` for ONNX, `docs/exercises.md` for exercises.
