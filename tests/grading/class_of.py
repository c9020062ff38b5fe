"""Grade a folder of submissions:  python -m tests.grading.class_of FOLDER --like conditional_detr

Every .py file in FOLDER is one submission, and so is every folder in it that holds one (or one called
--name). Results go to FOLDER/grades.csv and FOLDER/grades/STUDENT.json, the latter as Gradescope's
results.json. A file that is broken, hangs or crashes costs its own marks; the others go on. Every student
has other weights and images, drawn from the name and --seed, so that the same student gets the same ones
again.
"""

import argparse
import csv
import json
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from tests.grading.grader import Grade, Verdict, grade, gradescope, marks_of
from tests.grading.repeats import identical, repeated


def submissions(folder, name=None):
    """{student: file}; a folder with several files and none called `name` is left to a sentence."""
    found, unclear = {}, {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "grades":
            continue
        if path.suffix == ".py":
            found[path.stem] = path
        elif path.is_dir():
            files = sorted(path.rglob(name or "*.py"))
            if len(files) == 1:
                found[path.name] = files[0]
            else:
                unclear[path.name] = f"{len(files)} files {name or '*.py'}, there must be one (see --name)"
    return found, unclear


def seed_of(student, seed):
    return (zlib.crc32(student.encode()) + seed) % 1_000_000


def graded(student, file, args):
    try:
        found = grade(
            file, args.like, seed_of(student, args.seed), args.marks, args.seconds, threads=args.threads
        )
        warnings = repeated(file, args.like, args.exercise) if args.exercise else []
        return found._replace(warnings=found.warnings + warnings)
    except Exception as error:  # whatever a file can do to us, the others are graded
        return failed(file, args, f"{type(error).__name__}: {error}")


def failed(file, args, why):
    names = args.marks or marks_of(args.like)
    return Grade(str(file), args.like, 0, {name: Verdict("lost", why) for name in names}, [], 0)


def row(student, found):
    """A line of the table."""
    same = identical(found.file, found.like) if os.path.isfile(found.file) else {}
    marks = {
        mark: points
        if found.verdicts[mark].status == "met"
        else (0 if found.verdicts[mark].status == "lost" else "not judged")
        for mark, points in found.marks().items()
    }
    return {
        "student": student,
        "earned": found.points("met"),
        "lost": found.points("lost"),
        "not judged": found.points("unjudged"),
        **marks,
        "seed": found.seed,
        "seconds": round(found.seconds),
        "blocks like ours": f"{sum(same.values())} of {len(same)}",
        "please look": "; ".join(found.warnings),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--like", required=True, help="the file of ours that they are meant to equal")
    parser.add_argument("--name", help="what the file is called, where submissions are folders")
    parser.add_argument("--marks", nargs="+", help="only these marks (default: all)")
    parser.add_argument(
        "--exercise",
        nargs="+",
        default=[],
        metavar="BLOCK",
        help="what was to be written: warn where it is our code, word for word",
    )
    parser.add_argument("--seed", type=int, default=0, help="other weights and images for everybody")
    parser.add_argument("--seconds", type=int, default=120, help="time for each mark (default 120)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="files at a time (default: a core each)"
    )
    args = parser.parse_args(argv)
    args.threads = max(1, (os.cpu_count() or 1) // max(1, args.jobs))
    try:
        known = marks_of(args.like)
    except ValueError as error:
        parser.error(f"--like {error}")
    if unknown := set(args.marks or ()) - set(known):
        parser.error(f"--marks {', '.join(sorted(unknown))}: {args.like} has {', '.join(known)}")
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is no folder")
    files, unclear = submissions(args.folder, args.name)
    if not files and not unclear:
        parser.error(f"{args.folder} has no submissions: neither .py files nor folders with one")
    out = args.folder / "grades"
    out.mkdir(exist_ok=True)
    found = {student: failed(args.folder / student, args, why) for student, why in unclear.items()}
    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        running = {pool.submit(graded, student, file, args): student for student, file in files.items()}
        for future in tqdm(as_completed(running), total=len(running), unit="file", disable=None):
            found[running[future]] = future.result()
    rows = [row(student, found[student]) for student in sorted(found)]
    for student, one in found.items():
        (out / f"{student}.json").write_text(json.dumps(gradescope(one), indent=1) + "\n", encoding="utf-8")
    with open(args.folder / "grades.csv", "w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for line in rows:
        if line["please look"]:
            print(f"please look at {line['student']}: this file {line['please look']}", file=sys.stderr)
    print(f"{len(rows)} submissions: {args.folder / 'grades.csv'}, and one JSON each in {out}")


if __name__ == "__main__":
    main()
