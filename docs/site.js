// The index of comparisons (results.md): sorted by a press on a head, filtered by words and by setting. Without this script it is a table.
"use strict";
document.querySelectorAll(".comparisons").forEach(part => {
  const table = part.querySelector("table");
  const heads = Array.from(table.tHead.rows[0].cells), rows = Array.from(table.tBodies[0].rows);
  const texts = column => [...new Set(rows.map(row => row.cells[column].textContent.trim()))].sort();
  const form = document.createElement("form");
  form.setAttribute("aria-label", "Filter the comparisons");
  form.addEventListener("submit", event => event.preventDefault());
  const field = (title, input) => {
    const label = form.appendChild(document.createElement("label"));
    label.append(`${title} `, input);
    return input;
  };
  const words = field("contains", Object.assign(document.createElement("input"), {type: "search"}));
  const choices = ["data", "matched", "seeds", "device"].map(title => {
    const column = heads.findIndex(head => head.textContent.trim() === title), select = document.createElement("select");
    select.append(new Option("any", ""), ...texts(column).map(text => new Option(text, text)));
    return [column, field(title, select)];
  });
  const filter = () => rows.forEach(row => {
    const said = row.textContent.toLowerCase();
    row.hidden = !(words.value.toLowerCase().split(/\s+/).every(word => said.includes(word)) &&
      choices.every(([column, select]) => !select.value || row.cells[column].textContent.trim() === select.value));
  });
  form.addEventListener("input", filter);
  part.prepend(form);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => row.cells[column].textContent.trim(), number = text => Number(text.replaceAll(",", ""));
      rows.sort((a, b) => {
        const x = key(a), y = key(b);
        const order = Number.isNaN(number(x)) || Number.isNaN(number(y)) ? x.localeCompare(y) : number(x) - number(y);
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
});

// What the theme leaves unnamed, and regions that scroll without a key to scroll them.
window.addEventListener("load", () => {
  document.querySelectorAll('[role="dialog"]:not([aria-label])').forEach(each => each.setAttribute("aria-label", "Search"));
  document.querySelectorAll(".md-code__nav").forEach(each => each.setAttribute("aria-label", "Code"));
  const seen = {};
  document.querySelectorAll("nav[aria-label], nav[aria-labelledby]").forEach(each => {
    const by = each.getAttribute("aria-labelledby");
    const name = (by ? document.getElementById(by).textContent : each.getAttribute("aria-label")).trim();
    const key = name.toLowerCase();  // names of landmarks are compared without case
    seen[key] = (seen[key] || 0) + 1;
    if (seen[key] === 1) return;
    each.removeAttribute("aria-labelledby");
    each.setAttribute("aria-label", `${name} ${seen[key]}`);
  });
  // What scrolls is reached by the keyboard; the theme does so for code alone, and where a pointer can hover.
  const watched = new ResizeObserver(entries => requestAnimationFrame(() => entries.forEach(({target}) => {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
  })));
  document.querySelectorAll("pre > code, .md-typeset p:has(> img:only-child)").forEach(each => watched.observe(each));
  document.querySelectorAll(".md-typeset__scrollwrap").forEach(each => {
    each.tabIndex = 0;
    each.setAttribute("role", "group");
    each.setAttribute("aria-label", "Table");
  });
});
