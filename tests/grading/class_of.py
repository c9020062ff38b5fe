"""Grade a folder of submissions:  python -m tests.grading.class_of FOLDER --like conditional_detr

Every .py file in FOLDER is one submission, and so is every folder in it with one such file (or one called
--name). Results go to FOLDER/grades.csv and, as Gradescope's results.json, to FOLDER/grades/STUDENT.json.
Broken files cost their own marks; the others continue. Weights and images are drawn from the student's name
and --seed, so that the same student gets the same ones again.
"""
import argparse
import csv
import os
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from tests.grading.grader import SECONDS, all_lost, grade, marks_of, write_results
from tests.grading.repeats import identical, repeated


def submissions(folder, name=None):
    """({student: file}, {student: sentence about a folder that has several files or none})."""
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
        found = grade(file, args.like, seed_of(student, args.seed), args.marks, args.seconds)
        return found._replace(warnings=repeated(file, args.like, args.exercise))
    except Exception as error:  # whatever a file can do to us, the others are graded
        return all_lost(file, args.like, f"{type(error).__name__}: {error}", args.marks)


def row(student, found):
    """A line of the table."""
    same = identical(found.file, found.like)
    points = {mark: {"met": points, "lost": 0, "unjudged": "not judged"}[found.verdicts[mark].status]
              for mark, points in found.marks().items()}
    return {"student": student, "earned": found.points("met"), "lost": found.points("lost"),
            "not judged": found.points("unjudged"), **points, "seed": found.seed,
            "seconds": round(found.seconds), "blocks like ours": f"{sum(same.values())} of {len(same)}",
            "please look": "; ".join(found.warnings)}


def options(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--like", required=True, help="the file of ours that they are meant to equal")
    parser.add_argument("--name", help="name of the file, where submissions are folders")
    parser.add_argument("--marks", nargs="+", help="only these marks (default: all)")
    parser.add_argument("--exercise", nargs="+", default=[], metavar="BLOCK",
                        help="blocks that were to be written: warn where they are our code, word for word")
    parser.add_argument("--seed", type=int, default=0, help="other weights and images for everybody")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="processor time of a mark (default 60)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="files at a time (default: cores)")
    args = parser.parse_args(argv)
    try:
        if not set(args.marks or ()) <= set(marks_of(args.like)):
            parser.error(f"--marks: {args.like} has {', '.join(marks_of(args.like))}")
    except ValueError as error:
        parser.error(f"--like {error}")
    args.files, args.unclear = submissions(args.folder, args.name) if args.folder.is_dir() else ({}, {})
    if args.files or args.unclear:
        return args
    parser.error(f"{args.folder} has no submissions: neither .py files nor folders with one")


def main(argv=None):
    args = options(argv)
    (out := args.folder / "grades").mkdir(exist_ok=True)
    found = {name: all_lost(args.folder / name, args.like, why, args.marks)
             for name, why in args.unclear.items()}
    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        running = {pool.submit(graded, student, file, args): student for student, file in args.files.items()}
        for future in tqdm(as_completed(running), total=len(running), unit="file", disable=None):
            found[running[future]] = future.result()
        for student, one in found.items():
            write_results(out / f"{student}.json", one)
    rows = [row(student, found[student]) for student in sorted(found)]
    with open(args.folder / "grades.csv", "w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} submissions: {args.folder / 'grades.csv'}, and one JSON each in {out}")


if __name__ == "__main__":
    main()
