"use strict";
(function () {
  const table = document.getElementById("site-table");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);
  const superscripts = "⁰¹²³⁴⁵⁶⁷⁸⁹";
  rows.forEach((row, i) => { row.dataset.order = i; });

  function numeric(text) {
    if (text === "exact") return Infinity;
    const plain = text.replace(/,/g, "").replace("×10", "e").replace(/[⁻−]/g, "-")
      .replace(/[⁰¹²³⁴⁵⁶⁷⁸⁹]/g, (digit) => superscripts.indexOf(digit));
    const value = parseFloat(plain.split(":")[0]);
    return Number.isNaN(value) ? -Infinity : value;
  }

  function sortBy(index) {
    const head = heads[index];
    const isText = head.classList.contains("text");
    const first = isText ? "ascending" : "descending";
    const other = isText ? "descending" : "ascending";
    const before = head.getAttribute("aria-sort");
    const now = before === first ? other : before === other ? null : first;
    heads.forEach((each) => each.removeAttribute("aria-sort"));
    if (now) head.setAttribute("aria-sort", now);
    const sign = now === "descending" ? -1 : 1;
    const key = (row) => row.cells[index].textContent;
    const ordered = rows.slice().sort((a, b) => {
      const byPlace = a.dataset.order - b.dataset.order;
      if (!now) return byPlace;
      const order = isText ? key(a).localeCompare(key(b), "en", { numeric: true }) : numeric(key(a)) - numeric(key(b));
      return sign * order || byPlace;
    });
    body.append(...ordered);
  }

  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sortBy(index));
    head.replaceChildren(button);
  });

  const input = document.getElementById("filter");
  const shown = document.getElementById("shown");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row) => {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      count += row.hidden ? 0 : 1;
    });
    shown.textContent = words.length ? count + " of " + rows.length : "";
  });
  document.querySelector(".filter").hidden = false;
})();
