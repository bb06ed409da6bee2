"use strict";
// Without this script everything is there too: pictures link to their videos, cards stand in the order chosen.
const cards = [...document.querySelectorAll("#cards article")];
const find = document.getElementById("find"), order = document.getElementById("order");

function arrange() {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const card of cards) {
    const text = [...card.querySelectorAll("h3, .caption, .origin")].map((part) => part.textContent).join(" ").toLowerCase();
    card.hidden = !words.every((word) => text.includes(word));
    shown += !card.hidden;
  }
  const sign = order.selectedOptions[0].dataset.bad === "high" ? -1 : 1;
  const badness = (card) => {
    const value = JSON.parse(card.dataset.values)[order.value];
    return value === undefined ? Infinity : sign * value;
  };
  const sorted = order.value ? [...cards].sort((a, b) => badness(a) - badness(b)) : cards;
  document.getElementById("cards").append(...sorted);
  document.getElementById("found").value = shown === cards.length ? "" : `${shown} of ${cards.length}`;
}

if (find) {
  document.querySelector(".controls").hidden = false;
  document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
  find.addEventListener("input", arrange);
  order.addEventListener("input", arrange);
}

for (const link of document.querySelectorAll(".play a")) {
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const video = document.createElement("video");
    Object.assign(video, { src: link.href, controls: true, loop: true, muted: true, playsInline: true, autoplay: true });
    link.replaceWith(video);
    video.focus();
  });
}
