const form = document.forms[0], rows = [...document.querySelectorAll(".row[data-suite]")];
const texts = rows.map(row => row.textContent.toLowerCase());
function show() {
  const field = name => form[name] ? form[name].value : "", words = field("text").toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  rows.forEach((row, i) => {
    const fits = ["suite", "after", "change"].every(name => !field(name) || row.dataset[name] === field(name));
    row.hidden = !(fits && words.every(word => texts[i].includes(word)));
    shown += !row.hidden;
  });
  form.querySelector("output").textContent = `${shown} of ${rows.length} prompts`;
}
form.addEventListener("input", event => {
  if (event.target.name === "open") document.querySelectorAll("details.unwanted").forEach(d => d.open = event.target.checked);
  else show();
});
form.addEventListener("submit", event => event.preventDefault());
form.hidden = false;
show();
