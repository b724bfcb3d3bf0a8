// Experts as colours: the backgrounds of token and cell. Knows no element of the page.
//
// A layer's experts stand side by side in their own order, so the place says which ones they are
// even where the colour does not.

const NUM_COLOURS = 8;
const PASSED = "linear-gradient(transparent 35%, var(--passed) 35% 65%, transparent 65%)";

export const colourOf = (expert) => `var(--expert-${expert % NUM_COLOURS})`;

/** One row for one layer: a column per expert, filled where it was used. */
export function rowOf(experts, numExperts) {
  if (experts === null) return PASSED;
  const stops = [];
  for (let expert = 0; expert < numExperts; expert += 1) {
    const colour = experts.includes(expert) ? colourOf(expert) : "transparent";
    stops.push(`${colour} ${share(expert, numExperts)} ${share(expert + 1, numExperts)}`);
  }
  return `linear-gradient(90deg, ${stops.join(", ")})`;
}

/** Only the experts that were used, in equal parts of the whole. */
export function splitOf(experts, mix = (colour) => colour) {
  const stops = experts.map(
    (expert, at) =>
      `${mix(colourOf(expert))} ${share(at, experts.length)} ${share(at + 1, experts.length)}`,
  );
  return `linear-gradient(90deg, ${stops.join(", ")})`;
}

/** How a token looks in one layer: "pending", "uncomputed", "passed", "none", "one" or "several". */
export function stateIn(routing, layer) {
  if (routing === null) return "pending";
  if (routing.experts === null) return "uncomputed";
  if (layer === null) return "all";
  const experts = routing.experts[layer];
  if (experts === null) return "passed";
  return ["none", "one"][experts.length] ?? "several";
}

/** The mark that is not a colour: expert numbers, or what there is instead. */
export function labelIn(routing, layer) {
  switch (stateIn(routing, layer)) {
    case "one":
    case "several":
      return numbersOf(routing.experts[layer]);
    case "none":
      return "∅";
    case "passed":
      return "–";
    default:
      return "";
  }
}

/** "2", "0·3", and "013" where dots would take too much room and nothing can be mistaken. */
function numbersOf(experts) {
  const isClear = experts.every((expert) => expert < 10);
  return experts.join(isClear && experts.length > 2 ? "" : "·");
}

/** One line of words for people who do not see the table. */
export function wordsOf(routing) {
  if (routing === null) return "experts not known yet";
  if (routing.experts === null) return "not computed (end of the answer)";
  return routing.experts
    .map((experts, layer) => {
      if (experts === null) return `layer ${layer}: passed by`;
      if (experts.length === 0) return `layer ${layer}: no expert`;
      return `layer ${layer}: ${experts.length === 1 ? "expert" : "experts"} ${experts.join(", ")}`;
    })
    .join("; ");
}

function share(part, whole) {
  return `${((100 * part) / whole).toFixed(2)}%`;
}
