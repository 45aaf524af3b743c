"""Kill a training again and again, and see that it ends bit for bit where one that was never stopped does.

    PYTHONPATH=.:tests python tests/training/kills.py --kills 50 --processes 2

Half of the kills (SIGKILL) come at a write of a checkpoint, before or after a call that opens, fills, renames or
removes a file, evenly spread over all of these; the others at random times. After each, the training is started again
with resume_from_checkpoint=True. Checked by reading the files, not by asking the library: that what is resumed equals
the same checkpoint of the training that was never stopped, and that no later checkpoint does.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from peft import LoraConfig
from training_cases import TIMING, checkpoint_tensors, make_trainer, same

from examples.tiny import tiny_flux

# Names of calls into C that change files: of io, os, torch's and safetensors' writers.
WRITES = {
    *(
        "open",
        "write",
        "close",
        "flush",
        "fsync",
        "mkdir",
        "rename",
        "replace",
        "unlink",
        "remove",
        "rmdir",
        "truncate",
    ),
    *("write_record", "write_end_of_file", "serialize_file", "PyTorchFileWriter"),
}
UPDATES = 5


class WriteCounter:
    """Counts the writes of this process while a checkpoint is saved, and kills it at one of them.

    Args:
        kill_at (int | None): number of the event to die at; each write has one before and one after it.
    """

    def __init__(self, kill_at: int | None = None):
        self.count, self.kill_at = 0, kill_at

    def __call__(self, frame, event, function) -> None:
        if event in ("c_call", "c_return") and function.__name__ in WRITES:
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1

    def during(self, save):
        def counted(*arguments):
            sys.setprofile(self)
            try:
                return save(*arguments)
            finally:
                sys.setprofile(None)

        return counted


def reward(images, prompts, metadata):
    """Draws random numbers, whose state a checkpoint must hold too."""
    return (images * torch.rand(3, 1, 1)).mean((1, 2, 3)) - random.random() * images[:, 2].square().mean((1, 2))


def train(directory: Path, notes: Path, processes: int, limit: int | None, kill_at: int | None) -> None:
    """Train to the end, going on from what is there; writes what was resumed, and the number of writes."""
    trainer = make_trainer(
        directory,
        tiny_flux(),
        reward,
        arguments={"peft_config": LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k"])},
        max_steps=UPDATES,
        sample_num_steps=2,
        gradient_accumulation_steps=2 // processes,
        ema_decay=0.7,
        lr_scheduler_type="linear",
        save_strategy="steps",
        save_steps=1,
        save_total_limit=limit,
        use_cpu=True,
    )
    counter = WriteCounter(kill_at)
    trainer._save_checkpoint = counter.during(trainer._save_checkpoint)
    load = trainer._load_from_checkpoint

    def loaded(checkpoint, model=None):
        (notes / f"resumed-{trainer.args.process_index}").write_text(Path(checkpoint).name)
        load(checkpoint, model)

    trainer._load_from_checkpoint = loaded
    trainer.train(resume_from_checkpoint=True if any(directory.glob("checkpoint-*/complete.json")) else None)
    (notes / f"writes-{trainer.args.process_index}").write_text(str(counter.count))


def start(directory: Path, notes: Path, processes: int, limit: int | None, kill_at: dict[int, int]) -> list[int]:
    """Start a training in as many processes as torchrun would, with its variables; returns their ids."""
    notes.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            with (notes / f"output-{rank}").open("w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            if processes > 1:
                known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                known |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in known.items()})
            train(directory, notes, processes, limit, kill_at.get(rank))
            code = 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    return children


def wait(children: list[int], kill_after: float | None = None) -> list[int]:
    """Wait until all have ended; when one dies, or the time is over, the others are killed. Returns the exit codes."""
    left, codes, begin = list(children), [], time.monotonic()
    while left:
        for child in list(left):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                left.remove(child)
                codes.append(os.waitstatus_to_exitcode(status))
        if left and (any(codes) or (kill_after is not None and time.monotonic() - begin > kill_after)):
            for child in left:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return codes


def content(checkpoint: Path) -> tuple | None:
    """All that a checkpoint holds but timings; None if a file is missing or cannot be read."""
    try:
        tensors = checkpoint_tensors(checkpoint)
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        random_states = [path.read_bytes() for path in sorted(checkpoint.glob("rng_state*.pth"))]
    except Exception:  # whatever the readers say of half a file
        return None
    history = [{key: value for key, value in row.items() if key not in TIMING} for row in state["log_history"]]
    return tensors, history, random_states


class Kills:
    """Kills a training until there were enough kills.

    Args:
        root (Path): an empty folder.
        processes (int): of each training.
        seed (int): of where and when the kills come.
    """

    def __init__(self, root: Path, processes: int, seed: int):
        self.root, self.processes, self.draw = root, processes, random.Random(seed)
        self.unbroken: dict[str, tuple] = {}
        self.directory = root / "killed"

    def start(self, name: str, directory: Path, limit: int | None = 2, kill_at=None, kill_after=None) -> Path | None:
        """Start a training; returns the folder of its notes if it came to its end, else None."""
        notes = self.root / "notes" / name
        sealed = self.whole(directory)
        codes = wait(start(directory, notes, self.processes, limit, kill_at or {}), kill_after)
        resumed = {path.read_text() for path in notes.glob("resumed-*")}
        assert not sealed or resumed <= {max(sealed)}, f"{resumed} was resumed, not the last of {sealed}"
        assert sealed or not resumed, f"{resumed} was resumed, but none is whole"
        output = "".join(path.read_text() for path in notes.glob("output-*"))
        assert set(codes) <= {0} or codes[0] == -signal.SIGKILL, output
        return notes if not any(codes) else None

    def whole(self, directory: Path) -> list[str]:
        """The checkpoints that are sealed, each of which must equal that of the unbroken training."""
        found = sorted(path for path in directory.glob("checkpoint-*") if (path / "complete.json").exists())
        for path in found if self.unbroken else ():
            assert same(content(path), self.unbroken[path.name]), f"{path} is sealed, but another"
        return [path.name for path in found]

    def train_unbroken(self) -> list[int]:
        """Train without a kill; returns the events at writes of each process."""
        kept = self.root / "kept"
        assert self.start("kept", kept, limit=None), "the training without kills failed"
        self.unbroken = {path.name: content(path) for path in kept.iterdir()}
        assert None not in self.unbroken.values() and len(self.unbroken) == UPDATES
        begin = time.monotonic()
        notes = self.start("limited", self.root / "limited")
        self.seconds = time.monotonic() - begin
        self.check_end(self.root / "limited")
        return [int((notes / f"writes-{rank}").read_text()) for rank in range(self.processes)]

    def check_end(self, directory: Path) -> None:
        """Whether the last checkpoints are there; an older one is left if the last kill came before its removal."""
        sealed = self.whole(directory)
        assert sealed[-2:] == [f"checkpoint-{UPDATES - 1}", f"checkpoint-{UPDATES}"] and len(sealed) <= 3, sealed
        others = [path.name for path in directory.iterdir() if path.name not in sealed]
        assert all(name.startswith("removed-") for name in others), others

    def run(self, kills: int) -> None:
        events = self.train_unbroken()
        print(f"never stopped: {self.seconds:.1f} s, events at writes of {UPDATES} checkpoints: {events}", flush=True)
        killed = trainings = 0
        while killed < kills:
            rank, at_write = killed % self.processes, killed // self.processes % 2 == 0
            done = max((int(name[-1]) for name in self.whole(self.directory)), default=0)
            if done > UPDATES // 2 and self.draw.random() < 0.5:
                assert self.start(f"{killed}-{trainings}-end", self.directory), "a start without a kill failed"
                trainings += self.end()
                continue
            left = max(UPDATES - done, 1)
            if at_write:
                own = events[rank] // UPDATES
                event = own * killed // kills + own * self.draw.randrange(left)
                options, where = {"kill_at": {rank: event}}, f"event {event} of process {rank}"
            else:
                after = self.draw.uniform(0.1, self.seconds * left / UPDATES)
                options, where = {"kill_after": after}, f"{after:.2f} s"
            ended = self.start(f"{killed}-{trainings}", self.directory, **options)
            if ended is None:
                killed += 1
                print(f"kill {killed} at {where}, having resumed {done}; left: {self.left()}", flush=True)
            else:
                trainings += self.end()
        assert self.start("last", self.directory), "the last start failed"
        trainings += self.end()
        print(
            f"{kills} kills, {trainings} trainings: each restart resumed the last whole checkpoint, and each training"
        )
        print("ended where the one that was never stopped did, bit for bit.")

    def end(self) -> int:
        self.check_end(self.directory)
        shutil.rmtree(self.directory)
        return 1

    def left(self) -> str:
        """What lies in the folder after a kill; what is not sealed in brackets."""
        sealed = self.whole(self.directory)
        names = sorted(path.name for path in self.directory.glob("*"))
        return " ".join(name if name in sealed else f"({name})" for name in names)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        Kills(Path(folder), options.processes, options.seed).run(options.kills)
