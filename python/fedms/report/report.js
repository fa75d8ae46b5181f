// What the page does beyond showing: sort a table, save one, look at one method or client, change the theme.
// Without it everything is still there to read.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const rows = table => all("tbody tr", table);
  const value = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent.trim();

  const compare = (a, b) => {
    const missing = text => text === "" || text === "–";
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    const [x, y] = [parseFloat(a.replace("−", "-")), parseFloat(b.replace("−", "-"))];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  };

  all("table").forEach(table => {
    all("thead th", table).forEach((th, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...th.childNodes);
      th.append(button);
      button.onclick = () => {
        // Numbers begin with the largest, words with the first; a second click turns the order round.
        const words = rows(table).some(row => Number.isNaN(parseFloat(value(row, i).replace("−", "-"))) && value(row, i) !== "–");
        const up = th.ariaSort ? th.ariaSort === "descending" : words;
        all("thead th", table).forEach(each => { each.ariaSort = null; });
        th.ariaSort = up ? "ascending" : "descending";
        const sorted = rows(table).sort((a, b) => {
          const [x, y] = [value(a, i), value(b, i)];
          return x === "–" || y === "–" ? compare(x, y) : (up ? 1 : -1) * compare(x, y);
        });
        table.tBodies[0].append(...sorted);
      };
    });
    const save = document.createElement("button");
    save.type = "button";
    save.className = "save";
    save.textContent = "CSV";
    save.setAttribute("aria-label", `Save as CSV: ${table.caption.textContent.trim()}`);
    save.onclick = () => {
      const cell = text => `"${text.trim().replaceAll('"', '""')}"`;
      const lines = all("tr", table).map(row => [...row.cells].map(each => cell(each.textContent)).join(","));
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([lines.join("\r\n") + "\r\n"], {type: "text/csv"}));
      link.download = table.caption.textContent.trim().toLowerCase().replace(/[^a-z0-9]+/g, "-") + ".csv";
      link.click();
      URL.revokeObjectURL(link.href);
    };
    table.parentNode.before(save);
  });

  // The parts of charts and tables that stand for other methods (classes of-NAME) or clients (client-N) fade.
  const chosen = {of: "", client: ""};
  const fade = document.head.appendChild(document.createElement("style"));
  all("select[data-of]").forEach(select => {
    select.onchange = () => {
      chosen[select.dataset.of] = select.value;
      fade.textContent = Object.entries(chosen).filter(([, name]) => name).map(([kind, name]) =>
        `[class*="${kind}-"]:not(.${kind}-${CSS.escape(name)}) { opacity: .25 }`).join("\n");
    };
  });

  const theme = document.getElementById("theme");
  theme.onclick = () => {
    const root = document.documentElement.style;
    root.colorScheme = {"": "dark", dark: "light", light: ""}[root.colorScheme];
    theme.textContent = `Theme: ${root.colorScheme || "as the system"}`;
  };
  all("[hidden]").forEach(each => { each.hidden = false; });
  window.onbeforeprint = () => all("details").forEach(each => { each.open = true; });
})();
