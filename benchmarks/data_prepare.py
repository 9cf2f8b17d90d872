"""The parts of data_prepare.sh: see there.

    make FOLDER MEGABYTES   corpus.jsonl, sources and documentation of this workspace's dependencies, a file a document; and
                            tokenizer.json, a byte-level BPE with the pattern of Llama 3 that is trained on 60 MB of it
    ours FOLDER COMMAND     one round of `moe-train data prepare`
    python FOLDER           one round of the Python package
    compare FOLDER          medians of all rounds, and whether they made the same number of tokens
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

VOCABULARY = 49_152
TRAINED_ON = 60_000_000
END = "<|endoftext|>"
THREADS = os.environ["RAYON_NUM_THREADS"]
# As in moe-train/tests/fixtures/tokenizer/make_tokenizer.py.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def documents(megabytes):
    """Texts of the crates that Cargo.lock names, and of this workspace, until they have so many bytes."""
    command = ["cargo", "metadata", "--locked", "--format-version", "1"]
    packages = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["packages"]
    left = megabytes * 1_000_000
    for package in sorted(packages, key=lambda package: package["name"]):
        # Generated bindings are neither code nor prose.
        if package["name"].startswith(("windows", "winapi", "web-", "js-")) or package["name"].endswith("sys"):
            continue
        for path in sorted(pathlib.Path(package["manifest_path"]).parent.rglob("*")):
            if path.suffix not in (".rs", ".md", ".py", ".c") or not path.is_file() or "target" in path.parts:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if 0 < len(text) <= 200_000:
                yield text
                left -= len(text.encode())
            if left <= 0:
                return


def make(folder, megabytes):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    texts = list(documents(megabytes))
    # What there is, until it is enough.
    unfinished = folder / "unfinished"
    with unfinished.open("w", encoding="utf-8") as file:
        left = megabytes * 1_000_000
        while left > 0:
            for text in texts:
                line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
                file.write(line)
                left -= len(line.encode())
                if left <= 0:
                    break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    sample, left = [], TRAINED_ON
    for text in texts:
        sample.append(text)
        left -= len(text)
        if left <= 0:
            break
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    unfinished.rename(folder / "corpus.jsonl")
    unique = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{unique:.0f} MB of {len(texts)} files, {tokenizer.get_vocab_size()} tokens of vocabulary", file=sys.stderr)


def report(who, seconds, folder, **more):
    rate = (folder / "corpus.jsonl").stat().st_size / 1e6 / seconds
    print(json.dumps({"who": who, "seconds": round(seconds, 3), "MB/s": round(rate, 2), **more}), flush=True)


def ours(folder, command):
    out = folder / "ours.tokens"
    out.unlink(missing_ok=True)
    arguments = ["data", "prepare", folder / "corpus.jsonl", "--tokenizer", folder, "--out", out, "--threads", THREADS]
    start = time.monotonic()
    said = subprocess.run([command, *arguments], check=True, capture_output=True, text=True).stdout
    seconds = time.monotonic() - start
    count, _, tokens = said.splitlines()[-1].split()[:3]
    report("moe-train data prepare", seconds, folder, documents=int(count), tokens=int(tokens))


def python(folder):
    """As preprocessing scripts do: batches of lines, encoded on all cores, ids to a file. Both ways of encoding a batch: with
    offsets into the text and, as `moe-train` does, without."""
    import numpy
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    for name in ["encode_batch", "encode_batch_fast"]:
        encode = getattr(tokenizer, name)
        start, encoding, count, tokens = time.monotonic(), 0.0, 0, 0
        with (folder / "corpus.jsonl").open("rb") as lines, (folder / "python.bin").open("wb") as out:
            while batch := lines.readlines(8_000_000):
                texts = [json.loads(line)["text"] for line in batch]
                before = time.monotonic()
                encodings = encode(texts)
                encoding += time.monotonic() - before
                for ids in (encoded.ids for encoded in encodings):
                    ids.append(end)
                    numpy.array(ids, dtype=numpy.uint16).tofile(out)
                    tokens += len(ids)
                count += len(texts)
            out.flush()
            os.fsync(out.fileno())
        seconds = time.monotonic() - start
        more = {"documents": count, "tokens": tokens}
        report(f"Python, {name}", seconds, folder, **more)
        report(f"Python, {name} alone", encoding, folder, **more)


def compare(folder):
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    counts = {(one["documents"], one["tokens"]) for one in rounds}
    assert len(counts) == 1, f"not the same tokens: {counts}"
    (count, tokens), = counts
    size = (folder / "corpus.jsonl").stat().st_size / 1e6
    print(f"{size:.0f} MB, {count} documents, {tokens} tokens, {THREADS} threads")
    for who in dict.fromkeys(one["who"] for one in rounds):
        seconds = [one["seconds"] for one in rounds if one["who"] == who]
        median = statistics.median(seconds)
        print(f"| {who} | {' | '.join(f'{s:.2f} s' for s in seconds)} | {size / median:.1f} MB/s | {tokens / median / 1e6:.2f} M tokens/s |")


if __name__ == "__main__":
    _, task, folder, *rest = sys.argv
    folder = pathlib.Path(folder)
    match task:
        case "make":
            make(folder, int(rest[0]))
        case "ours":
            ours(folder, rest[0])
        case "python":
            python(folder)
        case "compare":
            compare(folder)
