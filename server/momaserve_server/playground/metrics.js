// Numbers out of /metrics and /v1/router. Knows no element of the page.

/** Value of a gauge in Prometheus text; null without it. The prefix is the operator's to choose. */
export function gauge(text, stem) {
  const line = new RegExp(`^[a-zA-Z_]\\w*[_:]${stem}(?:\\{[^}\\n]*\\})? +(\\S+)`, "m").exec(text);
  return line === null ? null : Number(line[1]);
}

/** What `/metrics` says of the present. */
export function stateOf(text) {
  return {
    numRunning: gauge(text, "num_requests_running"),
    numWaiting: gauge(text, "num_requests_waiting"),
    kvUsage: gauge(text, "kv_cache_usage_perc"),
  };
}

/**
 * How busy the experts were between two replies of /v1/router; since the start without an older
 * one. Shares are null in a layer that computed nothing.
 * @returns {{name: string, numExperts: number, meanExperts: number|null,
 *            layers: {layer: number, shares: number[]|null}[]}[]}
 */
export function loadBetween(older, newer) {
  return newer.groups.map((group) => {
    const past = older?.groups.find(({ name }) => name === group.name);
    let numPairs = 0;
    let numSelected = 0;
    const layers = group.layers.map((row) => {
      const before = past?.layers.find(({ layer }) => layer === row.layer);
      const counts = row.expert_tokens.map((n, at) => n - (before?.expert_tokens[at] ?? 0));
      const total = counts.reduce((sum, n) => sum + n, 0);
      numSelected += total;
      numPairs += row.num_tokens - (before?.num_tokens ?? 0);
      return { layer: row.layer, shares: total ? counts.map((n) => n / total) : null };
    });
    const meanExperts = numPairs ? numSelected / numPairs : null;
    return { name: group.name, numExperts: group.num_experts, meanExperts, layers };
  });
}
