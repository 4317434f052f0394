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
