document.addEventListener("DOMContentLoaded", () => {
  // Wide tables and formulas scroll inside their own box; a keyboard can scroll them too.
  for (const box of document.querySelectorAll(".bd-article table, div.math")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
  // Folded cells say what they hide.
  const names = { tag_solution: "solution", tag_setup: "setup" };
  for (const [tag, name] of Object.entries(names)) {
    for (const summary of document.querySelectorAll(`.cell.${tag} details > summary`)) {
      for (const words of summary.querySelectorAll("p")) {
        words.textContent = words.textContent.replace(/code$/, name);
      }
    }
  }
});
