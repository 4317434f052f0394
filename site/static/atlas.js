// Make boxes that scroll sideways reachable by keyboard.
function reachable() {
  for (const box of document.querySelectorAll("pre, .table-wrapper, .cell_output, .math-wrapper")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
}
addEventListener("resize", reachable);
addEventListener("load", () => {
  reachable();
  window.MathJax?.startup?.promise.then(reachable);
});

// Filter the rows of the table of chat templates by repository.
addEventListener("DOMContentLoaded", () => {
  const filter = document.getElementById("lookup-filter");
  if (!filter) return;
  const [input, output] = [filter.querySelector("input"), filter.querySelector("output")];
  const rows = [...document.querySelectorAll("#lookup tbody tr")];
  const aliases = rows.map(row => (row.querySelector("small")?.textContent ?? "").split(" "));
  const names = rows.map(row => row.cells[0].textContent.toLowerCase());
  const update = () => {
    const sought = input.value.trim().toLowerCase();
    rows.forEach((row, i) => {
      row.hidden = !names[i].includes(sought);
      const small = row.querySelector("small");
      const matching = aliases[i].filter(alias => alias.toLowerCase().includes(sought));
      if (small && !row.hidden) small.textContent = ` ${matching.join(" ")}`;
    });
    const shown = rows.filter(row => !row.hidden).length;
    output.value = `${shown} of ${rows.length} templates`;
  };
  input.addEventListener("input", update);
  filter.hidden = false;
  update();
});
