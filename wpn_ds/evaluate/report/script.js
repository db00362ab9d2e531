// Searches and draws the answers. Texts of models reach the page as text nodes only, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("filters"), list = document.getElementById("answers"), more = document.getElementById("more");
const PAGE = 100, MARKS = {harmless: "✓", harmful: "▲", unusable: "?"};
let found = [], drawn = 0;

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}
const texts = values => values.map(value => make("p", "text", value));
const kind = verdict => verdict in MARKS ? verdict : "degenerate";

function fold(className, summary, ...children) {
  const details = make("details", className, make("summary", "", summary), ...children);
  details.open = className === "harm" && form.elements.open.checked;
  return details;
}

function badge(verdict) {
  return make("span", `badge ${kind(verdict)}`, `${MARKS[verdict] || "○"} ${verdict}`);
}

function drawAnswer(answer, when, row) {
  if (!answer) return make("div", "", make("p", "meta", `${when}: not asked`));
  const head = make("p", "verdict", make("span", "col", when), badge(answer.verdict));
  if (answer.refusal) head.append(make("span", "badge refusal", answer.refusal));
  const said = make("p", "said");
  answer.said.forEach((one, i) => {
    if (!one) return;
    const own = i === data.suites[row.suite].judge ? "own" : "";
    said.append(make("span", own, `${data.judges[i]}: ${one[0]}${one[1] && ` ${one[1]}`}`));
  });
  const body = answer.text.trim() ? texts([answer.text]) : [make("p", "meta", "(nothing)")];
  return make("div", "", head, said, ...(answer.verdict === "harmful" ? [fold("harm", "read the answer", ...body)] : body));
}

function drawRow(row) {
  const prompt = make("div", "prompt", make("p", "text", row.prompt), make("p", "meta", row.place));
  if (row.wanted.length) prompt.append(fold("", "wanted text", ...texts(row.wanted)));
  if (row.unwanted.length) prompt.append(fold("harm", "unwanted text", ...texts(row.unwanted)));
  const answers = data.baseline ? [drawAnswer(row.before, "before", row)] : [];
  answers.push(drawAnswer(row.after, data.baseline ? "after" : "", row));
  return make("article", data.baseline ? "row" : "row alone", prompt, ...answers);
}

function drawMore() {
  list.append(...found.slice(drawn, drawn + PAGE).map(drawRow));
  drawn = Math.min(drawn + PAGE, found.length);
  const left = found.length - drawn;
  more.hidden = !left;
  more.textContent = `Show ${Math.min(PAGE, left)} more of ${left.toLocaleString("en")}`;
}

function haystack(row) {
  const said = answer => answer ? answer.text : "";
  return row.haystack ||= [row.prompt, row.place, said(row.before), said(row.after), ...row.wanted, ...row.unwanted].join("\n").toLowerCase();
}

function disagree(row) {
  return new Set(row.after.said.filter(Boolean).map(one => kind(one[0]))).size > 1;
}

function show() {
  const field = name => form.elements[name] ? form.elements[name].value : "";
  const words = field("text").toLowerCase().split(/\s+/).filter(Boolean);
  const suite = field("suite"), verdict = field("verdict"), change = field("change"), judges = field("judges");
  found = data.rows.filter(row =>
    (!suite || row.suite === Number(suite)) &&
    (!verdict || (verdict === "refusal" ? row.after.refusal : kind(row.after.verdict) === verdict)) &&
    (!change || row.change === change) &&
    (!judges || (judges === "disagree") === disagree(row)) &&
    words.every(word => haystack(row).includes(word)));
  form.querySelector("output").textContent =
    `${found.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} prompts`;
  list.replaceChildren();
  drawn = 0;
  drawMore();
}

form.addEventListener("input", event => {
  if (event.target.name === "open") list.querySelectorAll("details.harm").forEach(details => details.open = event.target.checked);
  else show();
});
form.addEventListener("submit", event => event.preventDefault());
more.addEventListener("click", drawMore);
form.hidden = false;
show();
