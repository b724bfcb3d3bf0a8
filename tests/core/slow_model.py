"""What memory and answers must be, written as plainly as possible; shares no code with core.

`KVMemory` holds, instead of keys and values, the identity of what they were computed from:
everything that the K/V of a position depend on. A block that is shared, copied, evicted or
written by mistake shows as another identity. `Course` is the model: a pure function from the
identities of a request's last tokens to its next ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from momaserve.core.plan import PlannedSequence, StepPlan

BOS, BEGIN, END, EOS = 100, 101, 102, 103
TEXT = (10, 11, 12)
CODES = (20, 21)
POLICIES = ("causal", "calibrated", "expert_choice")
SALTS = (None, "red", "blue")


@dataclass(frozen=True)
class Submission:
    """What a client asks for; `n` answers to one prompt."""

    prompt: tuple[int, ...]
    max_tokens: int
    n: int = 1
    seed: int = 0
    salt: str | None = None
    priority: int = 0
    routing: str = "causal"
    prompt_routing: str = "causal"
    num_companions: int = 0
    num_codes: int = 0
    """Codes of each of its pictures; a guided request may draw several."""
    opens_picture: bool = False
    """`BEGIN` is forced behind the prompt. A prompt may also end with it."""
    has_bursts: bool = False
    """Now and then a token brings a forced one along."""
    prompt_logprobs: int | None = None

    @property
    def opening(self) -> tuple[int, ...]:
        """What is forced before anything is sampled."""
        return (BEGIN,) if self.opens_picture else ()

    @property
    def starts_in_picture(self) -> bool:
        return (*self.prompt, *self.opening)[-1] == BEGIN


@dataclass
class Ghost:
    """A sequence as the device sees it: every token there is, and each one's identity."""

    root: int
    num_prompt: int
    prompt_routing: str
    routing: str
    identities: list[int] = field(default_factory=list)

    def add(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            is_prompt = len(self.identities) < self.num_prompt
            policy = self.prompt_routing if is_prompt else self.routing
            before = self.identities[-1] if self.identities else self.root
            self.identities.append(hash((before, token_id, POLICIES.index(policy))))


class Course:
    """One answer on its way; `number` tells submissions apart, `index` the answers of one."""

    def __init__(self, submission: Submission, number: int, index: int) -> None:
        self.submission = submission
        self.seed = submission.seed + index
        salt = SALTS.index(submission.salt)
        self._companion_root = hash((salt,))
        is_whole = submission.prompt_routing == "expert_choice"
        root = hash((salt, number)) if is_whole else hash((salt,))
        self.main = Ghost(
            root, len(submission.prompt), submission.prompt_routing, submission.routing
        )
        self.companions: list[Ghost] = []
        self.output: list[int] = []
        self.codes_left = 0
        self.main.add(submission.prompt)
        if submission.prompt[-1] == BEGIN:
            self._begin_picture()
        self.append(submission.opening)

    @property
    def is_full(self) -> bool:
        return len(self.output) >= self.submission.max_tokens

    def append(self, token_ids: Sequence[int]) -> None:
        """The tokens become part of the answer, and those of a picture of its companions."""
        for token_id in token_ids:
            self.output.append(token_id)
            self.main.add([token_id])
            if token_id == BEGIN:
                self._begin_picture()
            elif token_id in CODES:
                self.codes_left -= 1
                for companion in self.companions:
                    companion.add([token_id])
            elif token_id == END:
                self.companions = []

    def _begin_picture(self) -> None:
        self.codes_left = self.submission.num_codes
        for index in range(self.submission.num_companions):
            companion = Ghost(self._companion_root, 2, "causal", "causal")
            companion.add(companion_prompt(index))
            self.companions.append(companion)

    def next_tokens(self, last: Sequence[int]) -> list[int]:
        """What follows, from the identities of the last tokens of the answer and companions."""
        asked = self.submission
        number = hash((self.seed, *last)) >> 8
        room = asked.max_tokens - len(self.output)
        if room == 0:
            return []
        if self.codes_left:
            code = CODES[number % 2]
            return [code, END] if self.codes_left == 1 else [code]
        dice = number % 16
        if asked.num_codes and dice < 4 and room >= asked.num_codes + 2:
            return [BEGIN]
        if asked.has_bursts and dice < 4 and room >= 2:
            return [TEXT[0], TEXT[dice % 3]]
        if dice == 15:
            return [EOS]
        return [TEXT[number // 16 % 3]]


def companion_prompt(index: int) -> tuple[int, int]:
    return (BOS + 10 * index, BEGIN)


def whole_answer(submission: Submission, number: int, index: int) -> list[int]:
    """The answer of a request that nobody disturbs."""
    course = Course(submission, number, index)
    while not course.is_full and EOS not in course.output:
        ghosts = (course.main, *course.companions)
        course.append(course.next_tokens([g.identities[-1] for g in ghosts]))
    return course.output


def taken_by(identity: int, layer: int) -> bool:
    """Whether a depth-routed layer takes a token: some take most, some few."""
    return hash((identity, layer)) % 7 < 1 + 2 * layer


class KVMemory:
    """What lies in each block: identities of tokens, or of entries of depth-routed layers.

    A block that is used for one can no longer be read as the other.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, num_routed: int = 0, entries_per_block: int = 1
    ) -> None:
        self._block_size = block_size
        self._routed = range(num_routed)
        self._entries_per_block = entries_per_block
        self._tokens: list[dict[int, int | None]] = [{} for _ in range(num_blocks)]
        """By offset in the block."""
        self._entries: list[dict[int, tuple[int, int] | None]] = [{} for _ in range(num_blocks)]
        """By offset: (identity, layer)."""
        self._index: list[dict[tuple[int, int], tuple[int, int]]] = [{} for _ in range(num_blocks)]
        """By (offset, layer) of a token: (block, offset) of its entry."""
        self._num_entries: dict[tuple[str, int], int] = {}
        """Of each sequence, those of steps in flight included."""

    def run(
        self, plan: StepPlan, rows: Sequence[tuple[PlannedSequence, Ghost]]
    ) -> tuple[list[tuple[int, int]], list[list[int]]]:
        """Copies, then writes all new positions, then reads all positions up to them.

        Returns:
            Every (block, offset) that was written, and how many layers took each row's tokens.
        """
        size = self._block_size
        targets = [target for _, target in plan.copies]
        assert len(set(targets)) == len(targets), "a block is copied to twice"
        contents = [(dict(self._tokens[s]), dict(self._index[s])) for s, _ in plan.copies]
        for target, (tokens, index) in zip(targets, contents, strict=True):
            self._entries[target] = {}
            self._tokens[target], self._index[target] = tokens, index
        written: list[tuple[int, int]] = []
        for row, ghost in rows:
            for position in range(row.start, row.start + row.num_new_tokens):
                slot = (row.blocks[position // size], position % size)
                self._entries[slot[0]] = {}
                self._tokens[slot[0]][slot[1]] = ghost.identities[position]
                written.append(slot)
        assert len(set(written)) == len(written), "two rows write to one slot"
        entries: list[tuple[int, int]] = []
        counts = [self._append(row, ghost, entries) for row, ghost in rows]
        assert len(set(entries)) == len(entries), "two entries are written to one slot"
        for row, ghost in rows:
            self._check(row, ghost)
        of_copies = [(b, offset) for b in targets for offset in range(size)]
        return [*written, *of_copies, *entries], counts

    def _append(
        self, row: PlannedSequence, ghost: Ghost, written: list[tuple[int, int]]
    ) -> list[int]:
        """Writes the entries of a row's tokens behind those that the sequence has."""
        size, name = self._block_size, (row.request_id, row.companion)
        bound = row.max_num_entries - row.num_new_tokens * len(self._routed)
        is_exact = bound == row.num_entries  # nothing of it is in flight
        number = row.num_entries if is_exact else self._num_entries[name]
        assert row.num_entries <= number <= bound
        counts: list[int] = []
        for position in range(row.start, row.start + row.num_new_tokens):
            block, offset = row.blocks[position // size], position % size
            identity = ghost.identities[position]
            counts.append(0)
            for layer in self._routed:
                self._index[block].pop((offset, layer), None)
                if not taken_by(identity, layer):
                    continue
                target = row.entry_blocks[number // self._entries_per_block]
                slot = (target, number % self._entries_per_block)
                self._tokens[target], self._index[target] = {}, {}
                self._entries[target][slot[1]] = (identity, layer)
                self._index[block][offset, layer] = slot
                written.append(slot)
                number += 1
                counts[-1] += 1
        self._num_entries[name] = number
        return counts

    def _check(self, row: PlannedSequence, ghost: Ghost) -> None:
        size = self._block_size
        for position in range(row.start + row.num_new_tokens):
            block, offset = row.blocks[position // size], position % size
            identity = ghost.identities[position]
            found = self._tokens[block].get(offset)
            assert found == identity, f"{row}: block {block} holds something else"
            for layer in self._routed:
                slot = self._index[block].get((offset, layer))
                assert (slot is not None) == taken_by(identity, layer), f"{row}: {position}"
                if slot is not None:
                    entry = self._entries[slot[0]].get(slot[1])
                    assert entry == (identity, layer), f"{row}: entry of {position} is lost"

    def spoil(self, slots: Sequence[tuple[int, int]]) -> None:
        """What a step that failed may leave behind."""
        for block, offset in slots:
            self._tokens[block][offset] = None
            self._entries[block][offset] = None
