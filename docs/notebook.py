"""Writes docs/first_steps.ipynb from docs/first_steps.py: python docs/notebook.py"""
import json
import re
from pathlib import Path

DOCS = Path(__file__).parent
METADATA = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []},
            "kernelspec": {"display_name": "Python 3", "name": "python3"},
            "language_info": {"name": "python"}}


def notebook(script):
    """The text of the .ipynb file. "# %%" begins a cell; text and the shell's lines lose their "# "."""
    content = []
    for markdown, text in re.findall(r"^# %%(?: \[(markdown)\])?\n(.*?)(?=^# %%|\Z)", script, re.M | re.S):
        text = re.sub("^# ?" if markdown else "# (?=!)", "", text.strip(), flags=re.M)
        more = {} if markdown else {"execution_count": None, "outputs": []}
        content.append({"cell_type": markdown or "code", "metadata": {}, **more,
                        "source": text.splitlines(keepends=True)})
    whole = {"cells": content, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    script = (DOCS / "first_steps.py").read_text(encoding="utf-8")
    (DOCS / "first_steps.ipynb").write_text(notebook(script), encoding="utf-8")
